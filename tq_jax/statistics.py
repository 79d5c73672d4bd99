"""Key statistics: the mean subtracted from keys and the weights of their channels, both before they are quantized.

Softmax does not see a mean that all keys of a head share, but a quantizer spends its bits on it; and channels in which
queries are large deserve smaller errors. So keys are stored as quantize(w * (k - mean)) and read with the query q / w,
and the lost q . mean is added back to the logit. The weight of a channel, w = (rms(q) / std(k)) ** 0.4, balances both
sides; the square root that theory suggests leaves more divergence on real models.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.pytree import pytree

MIN_TOKENS = 32
"""Keys that statistics need. If a row has fewer when its statistics are fixed, its keys are stored as they are."""

BALANCE = 0.4
"""Power of the ratio of queries to keys in the weight of a channel; measured on SmolLM2-135M and Qwen2.5-1.5B."""

FLOOR = 1e-2
"""Smallest spread of a channel, relative to the mean spread of its head; it bounds the weights of dead channels."""

EQUAL = 1e-5
"""If keys of a head spread less than this, relative to their size, they differ by rounding only: nothing to weigh."""


@pytree
class KeyStatistics:
    """Statistics of the keys of each cache row and KV head; a pytree.

    Attributes:
        mean: float32 [rows, h_kv, d], subtracted from keys.
        weight: float32 [rows, h_kv, d]; keys are multiplied by it, queries divided.
        query_power: float32 [rows, h_kv, d], sum of squares of the queries seen so far, averaged over the query heads
            of each KV head.
        query_count: float32 [rows], queries seen so far.
        ready: bool [rows], whether mean and weight are fixed.
    """

    mean: Float[Array, "rows h_kv d"]
    weight: Float[Array, "rows h_kv d"]
    query_power: Float[Array, "rows h_kv d"]
    query_count: Float[Array, "rows"]
    ready: Bool[Array, "rows"]


def empty_statistics(rows: int, kv_heads: int, head_dim: int) -> KeyStatistics:
    """Makes statistics that change nothing and are still to be fixed."""
    shape = (rows, kv_heads, head_dim)
    return KeyStatistics(
        mean=jnp.zeros(shape, jnp.float32),
        weight=jnp.ones(shape, jnp.float32),
        query_power=jnp.zeros(shape, jnp.float32),
        query_count=jnp.zeros(rows, jnp.float32),
        ready=jnp.zeros(rows, bool),
    )


def given_statistics(
    rows: int,
    mean: Float[Array, "*lead h_kv d"],
    weight: Float[Array, "*lead h_kv d"],
) -> KeyStatistics:
    """Makes statistics that are fixed from the start, e.g. calibrated once for a model.

    Args:
        rows: Rows of the cache.
        mean: Mean of the keys, [h_kv, d] for all rows or [rows, h_kv, d].
        weight: Positive weights of their channels, shaped like the mean.

    Returns:
        The statistics.
    """
    start = empty_statistics(rows, *mean.shape[-2:])
    shape = start.mean.shape
    return dataclasses.replace(
        start,
        mean=jnp.broadcast_to(mean.astype(jnp.float32), shape),
        weight=jnp.broadcast_to(weight.astype(jnp.float32), shape),
        ready=jnp.ones(rows, bool),
    )


def require_statistics(mean: np.ndarray, weight: np.ndarray) -> None:
    """Raises ValueError unless means are finite and weights are finite and positive."""
    if not np.isfinite(mean).all() or not (np.isfinite(weight) & (weight > 0)).all():
        raise ValueError(
            "expected finite means and positive, finite weights of channels, "
            f"got means {_range(mean)} and weights {_range(weight)}"
        )


def _range(x: np.ndarray) -> str:
    return f"{x.min():.4g} to {x.max():.4g}"


def observe_queries(stats: KeyStatistics, query: Float[Array, "b t h_q d"], valid: Bool[Array, "b t"]) -> KeyStatistics:
    """Adds queries to the running sums of rows whose statistics are not fixed yet."""
    kv_heads = stats.mean.shape[1]
    valid = valid & ~stats.ready[:, None]
    squares = jnp.where(valid[:, :, None, None], jnp.square(query.astype(jnp.float32)), 0.0)
    grouped = squares.reshape(*query.shape[:2], kv_heads, query.shape[2] // kv_heads, query.shape[-1])
    return dataclasses.replace(
        stats,
        query_power=stats.query_power + jnp.sum(jnp.mean(grouped, axis=3), axis=1),
        query_count=stats.query_count + jnp.sum(valid, axis=1, dtype=jnp.float32),
    )


def fix_statistics(
    stats: KeyStatistics,
    keys: Float[Array, "b s h_kv d"],
    valid: Bool[Array, "b s"],
    fix: Bool[Array, "b"],
    *,
    center: bool,
    smooth: bool,
) -> KeyStatistics:
    """Fixes mean and weight of the rows in `fix` from their keys and the queries seen so far."""
    keys, counted = keys.astype(jnp.float32), valid.astype(jnp.float32)[:, :, None, None]
    count = jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.float32), 1.0)[:, None, None]
    # A product with 0 is not enough: keys that are not valid may be NaN.
    keys = jnp.where(counted > 0, keys, 0.0)
    mean = jnp.sum(keys, axis=1) / count
    deviation = (keys - mean[:, None]) * counted
    spread = jnp.sqrt(jnp.sum(deviation * deviation, axis=1) / count)
    size = jnp.sqrt(jnp.sum(keys * keys, axis=1) / count)
    enough = fix & (jnp.sum(valid, axis=1) >= MIN_TOKENS)
    balance = (_query_rms(stats) / _floored(spread, least=EQUAL * _head_mean(size))) ** BALANCE

    def put(new: Array, old: Array, wanted: bool) -> Array:
        return jnp.where(enough[:, None, None], new, old) if wanted else old

    return dataclasses.replace(
        stats,
        mean=put(mean, stats.mean, center),
        weight=put(balance, stats.weight, smooth),
        ready=stats.ready | fix,
    )


def _query_rms(stats: KeyStatistics) -> Float[Array, "b h_kv d"]:
    """Root mean square of the queries per channel; ones for a row without queries, or with zeros only."""
    count = stats.query_count[:, None, None]
    rms = jnp.sqrt(stats.query_power / jnp.maximum(count, 1.0))
    return jnp.where(count > 0, _floored(rms, least=jnp.zeros_like(count)), 1.0)


def _floored(spread: Float[Array, "b h_kv d"], *, least: Float[Array, "b _ 1"]) -> Float[Array, "b h_kv d"]:
    """Spread, at least FLOOR times its mean over the head; ones for a head whose mean spread is at most `least`."""
    mean = _head_mean(spread)
    return jnp.where(mean > least, jnp.maximum(spread, FLOOR * mean), 1.0)


def _head_mean(x: Float[Array, "b h_kv d"]) -> Float[Array, "b h_kv 1"]:
    return jnp.mean(x, axis=-1, keepdims=True)
