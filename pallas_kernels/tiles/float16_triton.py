"""From packed bytes to float16 tiles inside a Pallas Triton kernel, for tensor cores that multiply 16-bit floats.

A codebook's centroid (m + 1/2) * step becomes (m + 1/2) / UNIT, exact and below one in magnitude. Times the stored
scale of its vector it is at most that scale, so the product overflows for no scale that float16 holds. Min-max codes
keep their unit. Each function builds PTX for four elements at a time and has a jnp twin for interpret mode, where PTX
does not run.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.format import Codebook
from pallas_kernels.numerics import BYTE_BITS, HALF_ANCHOR_BITS
from pallas_kernels.tiles.int8_triton import Field, codebook_tile, integer_tile, repeated_byte

UNIT = 128.0
"""A float16 tile of a codebook times UNIT * step is centroids times scales."""

ANCHOR_BITS = {1.0: HALF_ANCHOR_BITS, UNIT: 0x4800}
"""Bits of the float16 1024 / unit, by unit: its sum with n / unit has n as its low bits, for n from 0 to 1023."""


def centroid_tile(planes: Sequence[Field], book: Codebook, scale: jax.Array, *, interpret: bool) -> jax.Array:
    """Centroids / (UNIT * step) times scales, float16.

    Args:
        planes: The planes of the codes in storage order.
        book: The codebook.
        scale: float16, [1, tile] or [tile, 1]: one per token, broadcast along the channels.
        interpret: Whether to compute in jnp.

    Returns:
        float16, in the shape of the planes' tiles.
    """
    # [tile, width] for keys, [width, tile] for values
    m = codebook_tile(planes, book, interpret=interpret, apart=True)
    return _affine(m, scale, scale * (0.5 / UNIT), unit=UNIT, interpret=interpret)


def min_max_tile(planes: Sequence[Field], scale: jax.Array, zero: jax.Array, *, interpret: bool) -> jax.Array:
    """Unsigned codes of one plane times scale plus zero, both float16 [1, tile]: float16 [width, tile]."""
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
    """Returns m / unit * slope + offset, float16, for int8 m, a unit of 1 or UNIT, and float16 that broadcasts to m."""
    if interpret:
        product = m.astype(jnp.float32) * (1.0 / unit) * slope.astype(jnp.float32)
        return (product + offset.astype(jnp.float32)).astype(jnp.float16)
    slope, offset = (jnp.broadcast_to(x, m.shape) for x in (slope, offset))
    # The anchor with m + 128 as its low byte is the anchor plus (m + 128) / unit: no conversion of integers.
    anchor = ANCHOR_BITS[unit]
    top, middle = repeated_byte(anchor >> BYTE_BITS), f"0x{(anchor + 128) * 0x00010001:08x}"
    text = f"{{\n.reg .b32 u, t, v, w;\nxor.b32 u, $2, {repeated_byte(0x80)};\n"
    # Two halves per register: bytes 0 and 1 of u, then 2 and 3, each below the anchor's top byte.
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
