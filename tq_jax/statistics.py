"""Key statistics: what is subtracted from keys and how channels are weighted before they are quantized.

Softmax does not see a mean that all keys of a head share, but a quantizer spends its bits on it; and channels in which
queries are large deserve smaller errors. So keys are stored as quantize(w * (k - mean)) and read with q / w, the lost
q . mean being added back to the logit; w = (rms(q) / std(k)) ** 0.4 a channel balances both sides. The square root of
theory leaves more divergence on real models.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

MIN_TOKENS = 32
"""Keys that statistics need; with fewer at the moment they are fixed, keys are stored as they are."""

BALANCE = 0.4
"""Power of the ratio of queries to keys that weighs a channel; measured on SmolLM2-135M and Qwen2.5-1.5B."""

FLOOR = 1e-2
"""Smallest spread of a channel relative to the mean spread of its head; keeps weights of dead channels bounded."""

EQUAL = 1e-5
"""Keys of a head that spread less than this, relative to their size, are equal but for rounding: nothing to weigh."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyStatistics:
    """Statistics of the keys of each row and head of a cache; a pytree.

    Attributes:
        mean: float32 [rows, h_kv, d], subtracted from keys.
        weight: float32 [rows, h_kv, d], multiplied to keys and divided from queries.
        query_power: float32 [rows, h_kv, d], sum of squares of the queries seen so far, mean over the heads of a group.
        query_count: float32 [rows], queries seen so far.
        ready: bool [rows], whether mean and weight are fixed.
    """

    mean: Float[Array, "rows h_kv d"]
    weight: Float[Array, "rows h_kv d"]
    query_power: Float[Array, "rows h_kv d"]
    query_count: Float[Array, "rows"]
    ready: Bool[Array, "rows"]


def empty_statistics(rows: int, kv_heads: int, head_dim: int) -> KeyStatistics:
    """Statistics that change nothing and are still to be fixed."""
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
    """Statistics fixed from the start, e.g. calibrated once for a model.

    Args:
        rows: Rows of the cache.
        mean: [h_kv, d] for all rows or [rows, h_kv, d].
        weight: Likewise, positive.
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
    """Raises ValueError for values that are no statistics."""
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
    keys, weight = keys.astype(jnp.float32), valid.astype(jnp.float32)[:, :, None, None]
    count = jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.float32), 1.0)[:, None, None]
    # where, not only the product: keys of tokens that do not exist may be NaN.
    keys = jnp.where(weight > 0, keys, 0.0)
    mean = jnp.sum(keys, axis=1) / count
    deviation = (keys - mean[:, None]) * weight
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
    """Root mean square of the queries a channel; ones for rows that were not told any or only zeros."""
    count = stats.query_count[:, None, None]
    rms = jnp.sqrt(stats.query_power / jnp.maximum(count, 1.0))
    return jnp.where(count > 0, _floored(rms, least=jnp.zeros_like(count)), 1.0)


def _floored(spread: Float[Array, "b h_kv d"], *, least: Float[Array, "b _ 1"]) -> Float[Array, "b h_kv d"]:
    """Spread with a floor for single channels; ones for heads of no more than the least mean spread."""
    mean = _head_mean(spread)
    return jnp.where(mean > least, jnp.maximum(spread, FLOOR * mean), 1.0)


def _head_mean(x: Float[Array, "b h_kv d"]) -> Float[Array, "b h_kv 1"]:
    return jnp.mean(x, axis=-1, keepdims=True)
