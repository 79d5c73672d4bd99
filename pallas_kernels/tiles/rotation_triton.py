"""The orthogonal map between channels and the coordinates that are quantized, as kernels read it.

A segment of n * k channels is handled as an array [n, k]: element (i, j) is channel, or coordinate, i * k + j, its
place. The map of a segment is a Kronecker product, so that one factor applies to each axis. The prepare kernel rotates
queries, the merge kernel rotates outputs back (docs/decode_step.md).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.numerics import power_of_two
from pallas_kernels.pytree import pytree

NOWHERE = 1 << 30
"""A channel behind all channels."""

BLOCK = 16
"""Rows of an outer factor per step."""


@pytree
class Segment:
    """Coordinates y = (outer (x) inner) (signs * x) of consecutive channels x; arrays or references.

    Attributes:
        outer: float32 [n, n].
        inner: float32 [k, k]; None for the number one.
        signs: float32 [n * k]; None for ones.
    """

    outer: Any
    inner: Any = None
    signs: Any = None

    @property
    def inner_size(self) -> int:
        """Rows, and columns, of the inner factor."""
        return 1 if self.inner is None else self.inner.shape[0]

    @property
    def dim(self) -> int:
        """Channels of the segment."""
        return self.outer.shape[0] * self.inner_size


@pytree
class Basis:
    """Segments one after the other; a pytree of arrays or references.

    Attributes:
        segments: The segments.
        outliers: int32 [n], ascending channels that make up the first segment; the second has the other channels in
            order. None if the segments have all channels in order.
    """

    segments: tuple[Segment, ...]
    outliers: Any = None


def grid_of(segment: Segment, rows: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outer index, inner index and existence of the elements of a segment, [n, k] each, padded to powers of two.

    Args:
        segment: The segment.
        rows: Rows n of the arrays; all rows of the segment by default.
    """
    n = power_of_two(segment.outer.shape[0]) if rows is None else rows
    shape = (n, power_of_two(segment.inner_size))
    i, j = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return i, j, (i < segment.outer.shape[0]) & (j < segment.inner_size)


def channels_of(basis: Basis, index: int, place: jax.Array, valid: jax.Array) -> jax.Array:
    """Channels [n, k] at valid places [n, k] of segment number `index`."""
    if basis.outliers is None:
        return place + sum(segment.dim for segment in basis.segments[:index])
    if index == 0:
        return plt.load(basis.outliers.at[place], mask=valid, other=0)
    count = basis.outliers.shape[0]
    i = lax.broadcasted_iota(jnp.int32, (power_of_two(count),), 0)  # [outliers]
    outlier = plt.load(basis.outliers.at[i], mask=i < count, other=NOWHERE)  # [outliers]
    # Before outlier i there are outlier - i channels that are no outliers.
    return place + jnp.sum(((outlier - i)[None, None, :] <= place[:, :, None]).astype(jnp.int32), axis=2)


def apply_factors(
    segment: Segment,
    x: jax.Array,
    consume: Callable[[jax.Array, jax.Array, jax.Array, Any], Any],
    state: Any,
    *,
    inverse: bool,
) -> Any:
    """Multiplies vectors x [n, vectors, k] by both factors, or by their transposes, and passes on block after block.

    Args:
        segment: The segment; its signs are not applied.
        x: float32, padded with zeros. A thread holds the whole first axis, over which sums are: no exchange of sums.
        consume: Takes places [m, k] in the segment, whether they exist [m, k], the result [vectors, m, k] and a state;
            returns the next state.
        state: The first state.
        inverse: Whether to transpose the factors.

    Returns:
        The last state.
    """
    size = segment.outer.shape[0]
    padded = x.shape[0]
    rows = min(BLOCK, padded)
    i, j, _ = grid_of(segment, rows)
    inner = None
    if segment.inner is not None:
        # Loaded before the first sum, since no load moves up past a barrier: [k, k].
        column, row = (lax.broadcasted_iota(jnp.int32, (x.shape[2],) * 2, axis) for axis in (0, 1))
        inner = _factor(segment.inner, row, column, inverse)

    def block(index: jax.Array | int, state: Any) -> Any:
        shape = (padded, rows)  # [n, m]
        out_row = index * rows + lax.broadcasted_iota(jnp.int32, shape, 1)
        column = lax.broadcasted_iota(jnp.int32, shape, 0)
        outer = _factor(segment.outer, out_row, column, inverse)  # [n, m]
        y = jnp.sum(x[:, :, None, :] * outer[:, None, :, None], axis=0)  # [vectors, m, k]
        if inner is not None:
            # [k, vectors, m, 1] * [k, 1, 1, k], summed over the first axis: [vectors, m, k]
            y = jnp.sum(jnp.transpose(y, (2, 0, 1))[:, :, :, None] * inner[:, None, None, :], axis=0)
        outer_index = index * rows + i  # [m, k]
        valid = (outer_index < size) & (j < segment.inner_size)
        return consume(outer_index * segment.inner_size + j, valid, y, state)

    return block(0, state) if padded == rows else lax.fori_loop(0, padded // rows, block, state)


def _factor(ref: Any, row: jax.Array, column: jax.Array, transpose: bool) -> jax.Array:
    """Elements of a square factor at rows and columns of one shape, zero outside."""
    size = ref.shape[0]
    at = ref.at[column, row] if transpose else ref.at[row, column]
    return plt.load(at, mask=(row < size) & (column < size), other=0.0)


def load_signs(segment: Segment, place: jax.Array, valid: jax.Array) -> jax.Array | None:
    """Signs [n, k] at valid places [n, k] of a segment; None for ones."""
    return None if segment.signs is None else plt.load(segment.signs.at[place], mask=valid, other=0.0)


def float32_product(a: jax.Array, b: jax.Array, *, interpret: bool, transpose: bool = False) -> jax.Array:
    """Product [m, n] of a [m, k] and b [k, n] (or [n, k], transposed) on tensor cores, with the errors of float32."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1 if transpose else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
        preferred_element_type=jnp.float32,
    )
