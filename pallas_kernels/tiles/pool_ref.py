"""References of kernels to the arrays of pages, which are addressed by page and place in the page."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.compat.patches import MOST_NARROW


@dataclasses.dataclass(frozen=True)
class PoolShape:
    """Where the pages of an array lie: static.

    Attributes:
        page: Shape of the array in one page.
        distance: Elements from a page to the next one, at least those of a page.
    """

    page: tuple[int, ...]
    distance: int


@dataclasses.dataclass(frozen=True)
class PoolRef:
    """A reference to an array of pages.

    Attributes:
        ref: Reference to the array as `addressed` made it.
        shape: Where its pages lie.
        interpret: Whether the kernel runs as jnp.
    """

    ref: Any
    shape: PoolShape
    interpret: bool

    @property
    def pages(self) -> int:
        """Number of pages."""
        return math.prod(self.ref.shape) // self.shape.distance

    def at(self, page: jax.Array, *index: Any) -> Any:
        """Reference to elements.

        Args:
            page: Page; a number, or an array that broadcasts to the shape of the elements.
            *index: Place in the page, one for each axis: numbers, and at least one array, all arrays of one rank.
        """
        strides = [math.prod(self.shape.page[axis + 1 :]) for axis in range(len(self.shape.page))]
        terms = list(zip(index, strides, strict=True))
        # Numbers come before arrays, a page that is a number first: summed in another order, some kernels spill.
        terms.sort(key=lambda term: jnp.ndim(term[0]))
        flat, distance = len(self.ref.shape) == 1, self.shape.distance
        if flat and not page.ndim:
            return self.ref.at[_total([(page, distance), *terms])]
        place = _total(terms)
        if flat:
            return self.ref.at[page * distance + place]
        return self.ref.at[jnp.broadcast_to(page, place.shape) if page.ndim else page, place]

    def store(self, value: jax.Array, mask: jax.Array, page: jax.Array, *index: Any) -> None:
        """Writes elements.

        Args:
            value: The elements.
            mask: Which of them to write, in their shape.
            page: As for `at`.
            *index: As for `at`.
        """
        if self.interpret:
            # Interpreted stores write back the old values where they are masked; behind the pool they do no harm.
            page = jnp.where(mask, jnp.broadcast_to(page, mask.shape), self.pages)
        plt.store(self.at(page, *index), value, mask=mask)


def _total(terms: Sequence[tuple[Any, int]]) -> jax.Array:
    """Sum of numbers and arrays times their strides."""
    total, stride = terms[0]
    total = total * stride
    for term, stride in terms[1:]:
        total = total + term * stride
    return total


def addressed(pools: Any, shapes: Sequence[tuple[int, ...]]) -> tuple[Any, tuple[PoolShape, ...]]:
    """Arrays of pages as kernels take them.

    Args:
        pools: A pytree of arrays whose first axis is pages.
        shapes: The shape that each of them has in one page.

    Returns:
        The arrays, None where a page has no elements: flat if offsets of 32 bits reach every element, else [pages,
        distance]. Where the pages of the others lie.
    """
    leaves, structure = jax.tree.flatten(pools)
    arrays, found = [], []
    for pool, shape in zip(leaves, shapes, strict=True):
        if not pool.size or not math.prod(shape):
            arrays.append(None)
            continue
        distance = pool.size // pool.shape[0]
        arrays.append(pool.reshape(-1 if pool.size <= MOST_NARROW else (pool.shape[0], distance)))
        found.append(PoolShape(shape, distance))
    return jax.tree.unflatten(structure, arrays), tuple(found)


def pool_refs(refs: Any, shapes: Sequence[PoolShape], *, interpret: bool) -> Any:
    """References to arrays of pages, in the structure of the arrays.

    Args:
        refs: References to the arrays that `addressed` gave.
        shapes: Where their pages lie, as `addressed` gave it.
        interpret: Whether the kernel runs as jnp.
    """
    leaves, structure = jax.tree.flatten(refs)
    found = [PoolRef(ref, shape, interpret) for ref, shape in zip(leaves, shapes, strict=True)]
    return jax.tree.unflatten(structure, found)
