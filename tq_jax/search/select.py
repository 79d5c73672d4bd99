"""The best k of many scores in two stages: the best groups of neighbours first, then the best of their members."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Parts = TypeVar("Parts")


def group_size(count: int, k: int) -> int:
    """Columns of a group, a power of two that divides their count; 1 where groups do not save work.

    Example:
        >>> group_size(65536, 10), group_size(1000, 10), group_size(999, 10), group_size(64, 10)
        (64, 8, 1, 1)
    """
    # Groups and members of the best k of them are fewest together for sqrt(count / k).
    size = min(1 << (count // k).bit_length() // 2, count & -count)
    return size if 2 * (count // size + k * size) <= count else 1


def narrow(score: Callable[[Parts], Float[Array, "q n"]], parts: Parts, k: int) -> Parts:
    """Columns among which the k best of each row are, in the order they had.

    Scores are computed twice, for all columns and for those returned, so that none have to be stored.

    Args:
        score: Scores, column by column and without NaN, of parts such as these.
        parts: A pytree of arrays [q, n] and [1, n].
        k: How many; static.

    Returns:
        The parts [q, m] of these columns, or those given where it is not worth while.
    """
    count = jax.tree.leaves(parts)[0].shape[1]
    size = group_size(count, k)
    if size == 1:
        return parts
    maxima = jnp.max(_grouped(score(parts), size), axis=-1)
    # An element of the k best is in one of the k best groups; of equal groups the first hold the first elements.
    groups = lax.sort(lax.top_k(maxima, k)[1], dimension=1)
    return jax.tree.map(lambda part: _members(part, groups, size), parts)


def keep(
    kept: tuple[Float[Array, "q k"], Int[Array, "q k"]], scores: Float[Array, "q n"], ids: Int[Array, "#q n"]
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """The k best of those kept, which come first among equal scores, and of more scores with their ids."""
    k = kept[0].shape[1]
    new = scores, jnp.broadcast_to(ids, scores.shape)
    scores, ids = (jnp.concatenate(pair, axis=1) for pair in zip(kept, new, strict=True))
    top, places = lax.top_k(scores, k)
    return top, jnp.take_along_axis(ids, places, axis=1, mode="promise_in_bounds")


def _grouped(part: Array, size: int) -> Array:
    return part.reshape(part.shape[0], -1, size)


def _members(part: Array, groups: Array, size: int) -> Array:
    """Members of groups, which are in bounds, of an array of a row each or of one row for all."""
    grouped = _grouped(part, size)
    if part.shape[0] == 1:
        taken = grouped[0].at[groups].get(mode="promise_in_bounds")
    else:
        taken = jnp.take_along_axis(grouped, groups[:, :, None], axis=1, mode="promise_in_bounds")
    return taken.reshape(groups.shape[0], -1)
