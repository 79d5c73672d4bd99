"""Mean and channel weights of a layer's keys, computed from some of its queries and keys."""

import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Float

from tq_jax.statistics import KeyStatistics, empty_statistics, fix_statistics, observe_queries


class ObservedKeys:
    """The keys of a layer seen so far, and the sums over its queries.

    Example:
        >>> seen = ObservedKeys()
        >>> for _ in range(2):
        ...     seen.add(torch.randn(64, 4, 8), torch.randn(64, 2, 8) + 9)
        >>> mean, weight = seen.statistics()
        >>> mean.shape, bool((abs(mean - 9) < 2).all())
        ((2, 8), True)
    """

    def __init__(self) -> None:
        self._keys: list[torch.Tensor] = []
        self._sums: KeyStatistics | None = None

    def add(self, query: Float[torch.Tensor, "n h_q d"], key: Float[torch.Tensor, "n h_kv d"]) -> None:
        """Adds tokens.

        Args:
            query: Queries of n tokens, after rotary embedding.
            key: Keys of the same tokens, after rotary embedding.
        """
        sums = self._sums or empty_statistics(1, *key.shape[1:])
        self._sums = observe_queries(sums, _row(query), jnp.ones((1, len(query)), bool))
        self._keys.append(key.detach().cpu())

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and weight by the rules of `tq_jax.statistics`, float32 [h_kv, d].

        Needs at least `tq_jax.statistics.MIN_TOKENS` tokens.
        """
        assert self._sums is not None
        keys = _row(torch.cat(self._keys))
        every, one = jnp.ones(keys.shape[:2], bool), jnp.ones(1, bool)
        found = fix_statistics(self._sums, [(keys, every)], one, center=True, smooth=True)
        return np.array(found.mean[0]), np.array(found.weight[0])


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
    seen = ObservedKeys()
    seen.add(query, key)
    return seen.statistics()


def _row(tokens: torch.Tensor) -> jnp.ndarray:
    """Tokens [n, h, d] as a row of a cache, float32 [1, n, h, d]."""
    return jnp.asarray(tokens[None].detach().float().cpu().numpy())
