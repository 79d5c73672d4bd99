"""From packed bytes to float16 tiles inside a Pallas Triton kernel: what tensor cores of 16-bit floats read.

A codebook's centroid (m + 1/2) * step is (m + 1/2) / UNIT here, exact and below one in magnitude; times the stored
scale of its vector it is at most that scale, so nothing overflows that the storage could hold. Min-max codes come as
they are. Each function builds PTX for four elements at a time and has a jnp twin for interpret mode, where PTX does not
run.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.format import Codebook
from pallas_kernels.tiles.int8_triton import Field, codebook_tile, integer_tile

UNIT = 128.0
"""A float16 tile of a codebook times UNIT * step is centroids times scales."""


def centroid_tile(planes: Sequence[Field], book: Codebook, scale: jax.Array, *, interpret: bool) -> jax.Array:
    """Centroids / (UNIT * step) times scales, float16.

    Args:
        planes: The planes of the codes in storage order.
        book: The codebook.
        scale: float16, of a shape that broadcasts to the tile's.
        interpret: Whether to compute in jnp.
    """
    m = codebook_tile(planes, book, interpret=interpret, apart=True)
    return _affine(m, scale, scale * (0.5 / UNIT), unit=UNIT, interpret=interpret)


def min_max_tile(planes: Sequence[Field], scale: jax.Array, zero: jax.Array, *, interpret: bool) -> jax.Array:
    """Unsigned codes of one plane times scale plus zero, float16, which both are, of shapes that broadcast."""
    [plane] = planes
    middle = float(1 << (plane.width - 1))
    return _affine(
        integer_tile(plane, interpret=interpret, apart=True),
        scale,
        zero + scale * middle,
        unit=1.0,
        interpret=interpret,
    )


def _affine(m: jax.Array, slope: jax.Array, offset: jax.Array, *, unit: float, interpret: bool) -> jax.Array:
    """int8 m / unit * slope + offset, float16, for a unit of 1 or UNIT."""
    if interpret:
        product = m.astype(jnp.float32) * (1.0 / unit) * slope.astype(jnp.float32)
        return (product + offset.astype(jnp.float32)).astype(jnp.float16)
    slope, offset = (jnp.broadcast_to(x, m.shape) for x in (slope, offset))
    # Byte m + 128 below the top byte of a power of two is that power plus (m + 128) / unit: no conversion of integers.
    top, middle = {1.0: ("0x64646464", "0x64806480"), UNIT: ("0x48484848", "0x48804880")}[unit]
    text = "{\n.reg .b32 u, t, v, w;\nxor.b32 u, $2, 0x80808080;\n"
    for i, selector in enumerate(("0x4140", "0x4342")):
        text += (
            f"prmt.b32 t, u, {top}, {selector};\nmov.b32 w, {middle};\nsub.f16x2 v, t, w;\n"
            f"fma.rn.f16x2 ${i}, v, ${3 + i}, ${5 + i};\n"
        )
    [out] = plt.elementwise_inline_asm(
        text + "}",
        args=[m, slope, offset],
        constraints="=r,=r,r,r,r,r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(m.shape, jnp.float16)],
    )
    return out
