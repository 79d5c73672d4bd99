"""Codes of four channels at a time in bytes: magnitudes as cells of half a step, levels by tables.

No threshold is inside a cell, floor(2 s). With some cells added, at most one threshold is in a run of 32 cells, so that
the upper three bits of a cell find, in a table of eight bytes, what carries the cells above that threshold into the
next run; and then the upper bits find the level. One instruction looks up four channels.

A product with a number near 2**-149 is, in its bits, the integer below. Sums over channels are dot products of bytes,
in integers: for a search s is cut into three bytes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat.patches import elementwise_assembly
from pallas_kernels.encode.codes_by_comparison_triton import Quad
from pallas_kernels.format import Codebook
from pallas_kernels.tiles.intrinsics_triton import hexadecimal

RUN, LARGEST = 32, 223
"""Cells of a run, and the largest that a threshold may be at: nothing is carried out of a byte."""

SMALL = 2.0**-100
"""Factor of steps: products of them and of numbers near 2**-48 are then integers times the least float."""

TABLES = 5
"""Tables of eight bytes; see `tables`."""


def offset(book: Codebook) -> int | None:
    """Cells to add so that at most one threshold is in a run; None where there is no such number, or no threshold."""
    if not 2 <= book.bits < 8:
        return None
    cells = _cells(book)
    for start in range(RUN):
        if cells[-1] + start <= LARGEST and len({(cell + start) // RUN for cell in cells}) == len(cells):
            return start
    return None


def _cells(book: Codebook) -> list[int]:
    return [round(2 * threshold) for threshold in book.thresholds]


def tables(book: Codebook) -> np.ndarray:
    """int32 [2 * TABLES] of runs of cells.

    What carries the cells above the threshold into the next run; and of the level, 2m + 1,
    the upper and the next byte of m + 1/2 in float32, and the index.
    """
    start = offset(book)
    assert start is not None
    cells = [cell + start for cell in _cells(book)]
    carry = np.zeros(8, np.uint8)
    for cell in cells:
        carry[cell // RUN] = RUN - cell % RUN
    index = np.searchsorted(cells, RUN * np.arange(8))
    odd = 2 * np.asarray(book.levels)[index] + 1
    level = (odd / 2).astype(np.float32).view(np.uint32)
    return np.stack([carry, odd, level >> 24, level >> 16 & 255, index]).astype(np.uint8).view(np.int32).ravel()


def cut(quad: Quad, book: Codebook) -> list[jax.Array]:
    """The three bytes, lowest first, of each of four magnitudes given as steps times SMALL."""
    # Steps are below 1 / step, but for rounding.
    unit = hexadecimal(2.0 ** (math.floor(24 + math.log2(book.step) - 1e-3) - 149) / SMALL)
    lines = [f"abs.f32 m, ${3 + i};\nmul.rn.f32 m, m, {unit};\nmov.b32 n{i}, m;" for i in range(4)]
    lines += ["prmt.b32 a, n0, n1, 0x5140;", "prmt.b32 b, n2, n3, 0x5140;"]
    lines += ["prmt.b32 $0, a, b, 0x5410;", "prmt.b32 $1, a, b, 0x7632;"]
    lines += ["prmt.b32 a, n0, n1, 0x0062;", "prmt.b32 b, n2, n3, 0x0062;", "prmt.b32 $2, a, b, 0x5410;"]
    text = _block(".reg .f32 m;\n.reg .b32 n<4>, a, b;", lines)
    return elementwise_assembly(text, "=&r,=&r,=&r,f,f,f,f", quad, (jnp.int32,) * 3)


def sums(
    parts: Sequence[Quad], bytes_of: Sequence[Sequence[jax.Array]], factor: jax.Array, words: Quad, book: Codebook
) -> tuple[jax.Array, jax.Array]:
    """Of the levels q nearest to s * factor, <s, q> and <q, q> of each row, each up to a common factor.

    Args:
        parts: Quads of steps times SMALL.
        bytes_of: What `cut` makes of each.
        factor: One a row.
        words: The tables, each word once a row.
        book: The codebook.
    """
    wide, *spread = _spread([factor * (2.0**-148 / SMALL), *words[:4]], parts[0][0].shape)
    arguments = [wide, *spread, *(x for quad, cut in zip(parts, bytes_of, strict=True) for x in (*quad, *cut))]
    lines = []
    for k in range(len(parts)):
        first = 8 + 7 * k
        lines += _find(first, "$3", book) + _run("x", "$4", "$5") + _level("l", "$6", "$7")
        for i, total in enumerate(("$0", "d", "e")):
            lines.append(f"dp4a.u32.u32 {total}, ${first + 4 + i}, l, {total if k else 0};")
        lines.append(f"dp4a.u32.u32 $2, l, l, {'$2' if k else 0};")
    lines.append("mad.lo.u32 $1, e, 256, d;")
    constraints = "=&r,=&r,=&r,f,r,r,r,r" + ",f,f,f,f,r,r,r" * len(parts)
    text = _block(".reg .f32 m<4>;\n.reg .b32 n<4>, x, y, l, d, e;", lines)
    out = elementwise_assembly(text, constraints, arguments, (jnp.int32,) * 3)
    low, high, squared = (jnp.sum(x, axis=1).astype(jnp.float32) for x in out)
    return high * 256.0 + low, squared


def codes(
    parts: Sequence[Quad], factor: jax.Array, words: Quad, book: Codebook
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Codes of each quad, the four bytes of an int32 tile; <|y|, q> and <q, q> of each row.

    Args:
        parts: Quads of any y.
        factor: What makes steps times SMALL of them.
        words: The tables, each word once a row.
        book: The codebook.
    """
    wide, *spread = _spread([factor, *words], parts[0][0].shape)
    small = hexadecimal(2.0**-148 / SMALL)
    lines = [f"abs.f32 m{i}, ${3 + i};\nmul.f32 m{i}, m{i}, $7;" for i in range(4)] + [f"mov.f32 s, {small};"]
    lines += _find_in([f"m{i}" for i in range(4)], "s", book) + _run("x", "$8", "$9")
    lines += [*_level("l", "$10", "$11"), "dp4a.u32.u32 $1, l, l, 0;"]
    lines += [*_level("h", "$12", "$13"), *_level("l", "$14", "$15"), *_level("x", "$16", "$17")]
    for i in range(4):
        # Zeros are the sign of the upper byte.
        lines.append(f"prmt.b32 w, h, l, 0x{i:X}{4 + i:X}{8 + i:X}{8 + i:X};\nmov.b32 s, w;\nabs.f32 m0, ${3 + i};")
        lines.append("fma.rn.f32 $0, m0, s, $0;" if i else "mul.f32 $0, m0, s;")
    lines += ["prmt.b32 w, $3, $4, 0x00FB;", "prmt.b32 h, $5, $6, 0x00FB;", "prmt.b32 w, w, h, 0x5410;"]
    lines += [f"and.b32 w, w, 0x{0x01010101 << (book.bits - 1):08X};", "xor.b32 $2, x, w;"]
    text = _block(".reg .f32 m<4>, s;\n.reg .b32 n<4>, x, y, l, h, w;", lines)
    constraints, types = "=&f,=&r,=&r" + ",f" * 5 + ",r" * 10, (jnp.float32, jnp.int32, jnp.int32)
    found = [elementwise_assembly(text, constraints, [*quad, wide, *spread], types) for quad in parts]
    along, squared = (jnp.sum(sum((x[i] for x in found[1:]), found[0][i]), axis=1) for i in (0, 1))
    return [x[2] for x in found], along, squared.astype(jnp.float32) * 0.25


def _spread(rows: Sequence[jax.Array], shape: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.broadcast_to(row[:, None], shape) for row in rows]


def _block(declared: str, lines: Sequence[str]) -> str:
    return "{\n" + declared + "\n" + "\n".join(lines) + "\n}"


def _find(first: int, factor: str, book: Codebook) -> list[str]:
    lines = [f"abs.f32 m{i}, ${first + i};" for i in range(4)]
    return lines + _find_in([f"m{i}" for i in range(4)], factor, book)


def _find_in(m: Sequence[str], factor: str, book: Codebook) -> list[str]:
    """x: the cells of m0 to m3, with the offset, in bytes."""
    start = offset(book) or 0
    lines = [f"fma.rz.f32 {x}, {x}, {factor}, 0f{start:08X};\nmov.b32 n{i}, {x};" for i, x in enumerate(m)]
    return [*lines, "cvt.pack.sat.u8.s32.b32 x, n3, n2, 0;", "cvt.pack.sat.u8.s32.b32 x, n1, n0, x;"]


def _run(x: str, low: str, high: str) -> list[str]:
    """Carries cells above the threshold of their run into the next; y: selectors of the runs then."""
    return [*_select(x), f"prmt.b32 y, {low}, {high}, y;", f"add.u32 {x}, {x}, y;", *_select(x)]


def _select(x: str) -> list[str]:
    """y: the upper three bits of the bytes of x, as `prmt` takes them."""
    return [f"and.b32 y, {x}, 0xE0E0E0E0;", f"mul.hi.u32 y, y, {1 << 27 | 1 << 23};", "prmt.b32 y, y, y, 0x0020;"]


def _level(out: str, low: str, high: str) -> list[str]:
    return [f"prmt.b32 {out}, {low}, {high}, y;"]
