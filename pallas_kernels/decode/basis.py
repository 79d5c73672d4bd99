"""The orthogonal map between channels and the coordinates that are quantized, as kernels read it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

NOWHERE = 1 << 30
"""A channel that does not exist."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Basis:
    """Coordinates y_j = sum_c matrix[j, c] * signs[c] * x_c, segment by segment; a pytree of arrays or references.

    Attributes:
        matrices: float32 [d_i, d_i] of each segment, orthogonal.
        signs: float32 [d_i] of each segment; None for ones.
        outliers: int32 [n], ascending channels that make up the first segment, the others following in order; None for
            channels in order.
    """

    matrices: tuple[Any, ...]
    signs: tuple[Any, ...]
    outliers: Any = None


def basis_tile(basis: Basis, channel: jax.Array, coordinate: jax.Array, *, channel_axis: int) -> jax.Array:
    """The factors of channels [m] in coordinates [n]: [m, n] with channel_axis 0, else [n, m]; zero where outside."""

    def along(x: jax.Array, channels: bool) -> jax.Array:
        return x[:, None] if channels == (channel_axis == 0) else x[None, :]

    sizes = [channel.shape[0], coordinate.shape[0]]
    shape = tuple(sizes if channel_axis == 0 else sizes[::-1])
    place = _place(basis, channel)
    tile, start = jnp.zeros(shape, jnp.float32), 0
    for matrix, signs in zip(basis.matrices, basis.signs, strict=True):
        size = matrix.shape[0]
        c, j = place - start, coordinate - start
        here = (c >= 0) & (c < size)
        mask = along(here, True) & along((j >= 0) & (j < size), False)
        at = matrix.at[jnp.broadcast_to(along(j, False), shape), jnp.broadcast_to(along(c, True), shape)]
        factors = plt.load(at, mask=mask, other=0.0)
        if signs is not None:
            factors = factors * along(plt.load(signs.at[c], mask=here, other=0.0), True)
        tile = tile + factors
        start += size
    return tile


def _place(basis: Basis, channel: jax.Array) -> jax.Array:
    """Where each channel is among those in the order of the segments."""
    if basis.outliers is None:
        return channel
    count = basis.outliers.shape[0]
    index = lax.broadcasted_iota(jnp.int32, (power_of_two(count),), 0)
    outlier = plt.load(basis.outliers.at[index], mask=index < count, other=NOWHERE)
    before = jnp.sum((outlier[None, :] < channel[:, None]).astype(jnp.int32), axis=1)
    among = jnp.sum((outlier[None, :] == channel[:, None]).astype(jnp.int32), axis=1) > 0
    return jnp.where(among, before, count + channel - before)


def power_of_two(size: int) -> int:
    """The least power of two of at least a size.

    Example:
        >>> [power_of_two(n) for n in (1, 5, 64)]
        [1, 8, 64]
    """
    return 1 << (size - 1).bit_length()


def float32_product(a: jax.Array, b: jax.Array, *, interpret: bool, transpose: bool = False) -> jax.Array:
    """Multiplies a [m, k] by b [k, n] (or [n, k], transposed) with errors of float32 on tensor cores."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1 if transpose else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
        preferred_element_type=jnp.float32,
    )
