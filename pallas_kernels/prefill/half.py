"""From packed bytes to float16 tiles inside a Pallas Triton kernel: what tensor cores of 16-bit floats read.

A codebook's centroid (m + 1/2) * step is (m + 1/2) / UNIT here, exact and below one in magnitude; times the stored
scale of its vector it is at most that scale, so nothing overflows that the storage could hold. Min-max codes come as
they are. Each function builds PTX for four elements at a time and has a jnp twin for interpret mode, where PTX does not
run.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt

from pallas_kernels.format import Codebook
from pallas_kernels.lookup_triton import Field, codebook_tile, integer_tile

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
    if interpret or book.bits not in (2, 4) or planes[0].shift is not None:
        m = codebook_tile(planes, book, interpret=interpret)
        return _affine(m, scale, scale * (0.5 / UNIT), unit=UNIT, interpret=interpret)
    look_up = {2: _two_bits_ptx, 4: _four_bits_ptx}[book.bits]
    text = "{\n.reg .b32 a, b, g, h, l, r, t;\n" + look_up(book.levels, planes[0].field) + "}"
    return _run(text, planes[0].data, scale)


def min_max_tile(planes: Sequence[Field], scale: jax.Array, zero: jax.Array, *, interpret: bool) -> jax.Array:
    """Unsigned codes of one plane times scale plus zero, float16, which both are, of shapes that broadcast."""
    [plane] = planes
    middle = float(1 << (plane.width - 1))
    return _affine(
        integer_tile(plane, interpret=interpret), scale, zero + scale * middle, unit=1.0, interpret=interpret
    )


def fma(a: jax.Array, b: jax.Array, c: jax.Array, *, interpret: bool) -> jax.Array:
    """Returns a * b + c of float32 arrays that broadcast, in the one instruction that XLA does not make of them."""
    shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
    a, b, c = (jnp.broadcast_to(x, shape) for x in (a, b, c))
    if interpret:
        return a * b + c
    [out] = plt.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, b, c],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return out


def _affine(m: jax.Array, slope: jax.Array, offset: jax.Array, *, unit: float, interpret: bool) -> jax.Array:
    """int8 m / unit * slope + offset, float16, for a unit of 1 or UNIT."""
    if interpret:
        product = m.astype(jnp.float32) * (1.0 / unit) * slope.astype(jnp.float32)
        return (product + offset.astype(jnp.float32)).astype(jnp.float16)
    # Byte m + 128 below the top byte of a power of two is that power plus (m + 128) / unit: no conversion of integers.
    top, middle = {1.0: ("0x64646464", "0x64806480"), UNIT: ("0x48484848", "0x48804880")}[unit]
    text = "{\n.reg .b32 u, t, v, w;\nxor.b32 u, $2, 0x80808080;\n"
    for i, selector in enumerate(("0x4140", "0x4342")):
        text += (
            f"prmt.b32 t, u, {top}, {selector};\nmov.b32 w, {middle};\nsub.f16x2 v, t, w;\n"
            f"fma.rn.f16x2 ${i}, v, ${3 + i}, ${5 + i};\n"
        )
    return _run(text + "}", m, slope, offset)


def _run(text: str, data: jax.Array, *scalars: jax.Array) -> jax.Array:
    """PTX from four bytes in $2, and float16 pairs from $3 on, to four float16 in $0 and $1."""
    [out] = plt.elementwise_inline_asm(
        text,
        args=[data, *(jnp.broadcast_to(x, data.shape) for x in scalars)],
        constraints=",".join(["=r", "=r", "r"] + ["r"] * (2 * len(scalars))),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(data.shape, jnp.float16)],
    )
    return out


def _byte_tables(entries: Sequence[float]) -> tuple[list[str], list[str]]:
    """High and low bytes of float16 entries, four to an immediate."""
    bits = np.asarray(entries, np.float16).view(np.uint16)
    assert np.array_equal(bits.view(np.float16), np.asarray(entries))
    tables = []
    for part in (bits >> 8, bits & 0xFF):
        words = part.astype(np.uint8).view(np.uint32)
        tables.append([f"0x{int(word):08x}" for word in words])
    return tables[0], tables[1]


def _look_up(high: Sequence[str], low: Sequence[str], nibble: int, signs: tuple[str, str] | None) -> str:
    """Looks up the nibbles of a, and multiplies those of one place by the scales; ptxas shares what places share."""
    text, select = "", ("0x6240", "0x7351")[nibble]
    for i, index in enumerate(("a", "b")):
        text += f"prmt.b32 h, {high[0]}, {high[-1]}, {index};\nprmt.b32 l, {low[0]}, {low[-1]}, {index};\n"
        if signs is not None:
            text += f"prmt.b32 g, t, $2, {signs[i]};\nand.b32 g, g, 0x80808080;\nxor.b32 h, h, g;\n"
        text += f"prmt.b32 r, l, h, {select};\nmul.rn.f16x2 ${i}, r, ${3 + i};\n"
    return text


def _two_bits_ptx(levels: Sequence[int], field: int) -> str:
    values = [(m + 0.5) / UNIT for m in levels]
    high, low = _byte_tables(values + [-v for v in values])
    index = f"shr.b32 a, $2, {2 * (field % 2)};\nand.b32 a, a, 0x33333333;\nshr.b32 b, a, 16;\n"
    return index + _look_up(high, low, field // 2, None)


def _four_bits_ptx(levels: Sequence[int], field: int) -> str:
    high, low = _byte_tables([(m + 0.5) / UNIT for m in levels])
    index = "and.b32 a, $2, 0x77777777;\nshr.b32 b, a, 16;\nshl.b32 t, $2, 4;\n"
    # Top bits of bytes of the register are signs of high nibbles, those of itself four bits up of low ones.
    return index + _look_up(high, low, field, ("0xd9c8", "0xfbea"))
