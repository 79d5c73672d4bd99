"""Partial attention: softmax attention over a part of the keys before division, and the merge of two such parts."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pytree import pytree


@pytree
class Partial:
    """Attention of queries over a part of the keys, before division.

    Attributes:
        acc: float32 [b, t, h_q, d], sum of exp(logit - peak) * value.
        peak: float32 [b, t, h_q], largest logit; if the part is already normalized (total is 1), its log-sum-exp.
            `numerics.HIDDEN` where no key is visible.
        total: float32 [b, t, h_q], sum of exp(logit - peak).
    """

    acc: Float[Array, "b t h_q d"]
    peak: Float[Array, "b t h_q"]
    total: Float[Array, "b t h_q"]


def merge(a: Partial, b: Partial) -> Partial:
    """Combines attention over two disjoint sets of keys.

    Args:
        a: Attention over one set.
        b: Attention over the other set.

    Returns:
        Attention over the union.

    Example:
        >>> one = Partial(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1)))
        >>> both = merge(one, one)
        >>> both.acc.tolist(), both.total.tolist()
        ([[[[2.0, 2.0]]]], [[[2.0]]])
    """
    peak = jnp.maximum(a.peak, b.peak)
    keep_a, keep_b = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)  # [b, t, h_q] each
    acc = a.acc * keep_a[..., None] + b.acc * keep_b[..., None]  # [b, t, h_q, d]
    return Partial(acc, peak, a.total * keep_a + b.total * keep_b)
