"""Mean and channel weights of a layer's keys, computed from some of its queries and keys."""

import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Float

from tq_jax.statistics import empty_statistics, fix_statistics, observe_queries


def key_statistics(
    query: Float[torch.Tensor, "n h_q d"], key: Float[torch.Tensor, "n h_kv d"]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and channel weights by the rules of `tq_jax.statistics`.

    Args:
        query: Queries of n tokens, after rotary embedding.
        key: Keys of the same tokens, after rotary embedding; at least `tq_jax.statistics.MIN_TOKENS` tokens.

    Returns:
        Mean and weight, float32 [h_kv, d].

    Example:
        >>> mean, weight = key_statistics(torch.randn(64, 4, 8), torch.randn(64, 2, 8) + 9)
        >>> mean.shape, bool((abs(mean - 9) < 2).all())
        ((2, 8), True)
    """
    queries, keys = (jnp.asarray(x[None].detach().float().cpu().numpy()) for x in (query, key))
    every, one = jnp.ones(keys.shape[:2], bool), jnp.ones(1, bool)
    found = observe_queries(empty_statistics(1, *keys.shape[2:]), queries, every)
    found = fix_statistics(found, [(keys, every)], one, center=True, smooth=True)
    return np.array(found.mean[0]), np.array(found.weight[0])
