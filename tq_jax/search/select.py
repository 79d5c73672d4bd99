"""The best k of many scores in two stages: first the best groups of adjacent columns, then their best members."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Parts = TypeVar("Parts")


def group_size(count: int, k: int) -> int:
    """Columns per group, a power of two that divides `count`; 1 if groups do not save work.

    Example:
        >>> group_size(65536, 10), group_size(1000, 10), group_size(999, 10), group_size(64, 10)
        (64, 8, 1, 1)
    """
    # The number of groups plus that of the members of k groups is least for groups of sqrt(count / k).
    size = min(1 << (count // k).bit_length() // 2, count & -count)
    return size if 2 * (count // size + k * size) <= count else 1


def narrow(score: Callable[[Parts], Float[Array, "q n"]], parts: Parts, k: int) -> Parts:
    """Selects columns that include the k best of each query, in their order.

    Scores are computed twice, for all columns here and for the selected ones by the caller, so that none are stored.

    Args:
        score: Computes scores without NaN from parts, column by column.
        parts: A pytree of arrays [q, n] and [1, n].
        k: Columns wanted per query; static.

    Returns:
        The parts [q, m] of the selected columns; the parts as they are if a selection does not save work.
    """
    count = jax.tree.leaves(parts)[0].shape[1]
    size = group_size(count, k)
    if size == 1:
        return parts
    maxima = jnp.max(_grouped(score(parts), size), axis=-1)
    # The k best columns are in the k best groups; among equal groups, the first ones have the first columns.
    groups = lax.sort(lax.top_k(maxima, k)[1], dimension=1)
    return jax.tree.map(lambda part: _members(part, groups, size), parts)


def keep(
    kept: tuple[Float[Array, "q k"], Int[Array, "q k"]], scores: Float[Array, "q n"], ids: Int[Array, "#q n"]
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """The k best of the kept scores and of new ones, with their ids; among equal scores, kept ones come first."""
    k = kept[0].shape[1]
    new = scores, jnp.broadcast_to(ids, scores.shape)
    scores, ids = (jnp.concatenate(pair, axis=1) for pair in zip(kept, new, strict=True))
    top, places = lax.top_k(scores, k)
    return top, jnp.take_along_axis(ids, places, axis=1, mode="promise_in_bounds")


def _grouped(part: Array, size: int) -> Array:
    """Columns by group, [q, groups, size]."""
    return part.reshape(part.shape[0], -1, size)


def _members(part: Array, groups: Array, size: int) -> Array:
    """Members of the groups [q, k], all in bounds, of an array [q, n] or [1, n]."""
    grouped = _grouped(part, size)
    if part.shape[0] == 1:
        taken = grouped[0].at[groups].get(mode="promise_in_bounds")
    else:
        taken = jnp.take_along_axis(grouped, groups[:, :, None], axis=1, mode="promise_in_bounds")
    return taken.reshape(groups.shape[0], -1)
