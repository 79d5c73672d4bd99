"""PTX of codes by tables: the instructions for quads of channels, and the tables that they look levels up in.

A cell is half a step: the cell of a magnitude s is floor(2 s), and no threshold lies inside one. With an offset added
to every cell, at most one threshold lies in a run of 32 cells. So the upper three bits of a cell find, in a table of
eight bytes, the carry that moves the cells above that threshold into the next run; then the upper three bits find the
level. One `prmt` looks up four channels.

A float32 product with a number near 2**-149 is a denormal number whose bits are an integer. Rounded towards zero,
`fma.rz(m, factor, offset)` has the bits of floor(2 s) + offset. Sums over channels are dot products of bytes, in
integers; for a search, magnitudes are rounded to 24 bits and cut into three bytes.

Registers of the texts, where i is a channel (0 to 3):

    m<i>  float32 magnitude                      x     cells of four channels, one per byte; their indices at the end
    n<i>  magnitude as an integer                y     selectors of the runs of the cells
                                                 l     levels, one per byte
"""

import math
from collections.abc import Sequence

import numpy as np

from pallas_kernels.encode.codes_by_comparison_ptx import CHANNELS
from pallas_kernels.format import Codebook
from pallas_kernels.tiles.ptx import (
    EVEN_BYTES,
    EVERY_BYTE,
    INTERLEAVED_LOWER_HALVES,
    LOWER_HALVES,
    SIGN_BYTES,
    THIRD_BYTES,
    UPPER_HALVES,
    Assembly,
    assembly,
    block,
    float_constant,
    upper_bytes_of_float,
    word,
)

RUN = 32
"""Cells of a run."""

LARGEST = 223
"""The largest cell, with the offset, that a threshold may begin: nothing is carried out of a byte."""

SMALL = 2.0**-100
"""Factor of magnitudes in steps: products of them and of numbers near 2**-48 are then multiples of 2**-149."""

CELLS = 2.0**-148
"""A magnitude in steps times this, rounded towards zero, has its cell as its bits."""

TABLES = ("carry", "odd", "upper", "next", "index")
"""Tables of eight bytes, one byte per run; see `tables`."""


def cell_offset(book: Codebook) -> int | None:
    """The number to add to cells so that at most one threshold is in a run; None if the tables do not take the book."""
    if not 2 <= book.bits < 8:
        return None
    cells = _threshold_cells(book)
    for start in range(RUN):
        if cells[-1] + start <= LARGEST and len({(cell + start) // RUN for cell in cells}) == len(cells):
            return start
    return None


def _threshold_cells(book: Codebook) -> list[int]:
    """The cell that begins at each threshold."""
    return [round(2 * threshold) for threshold in book.thresholds]


def tables(book: Codebook) -> np.ndarray:
    """The tables of a codebook.

    Returns:
        int32 [2 * len(TABLES)], two words per table, one byte per run of cells: the carry of the cells above the run's
        threshold; 2m + 1 of the level m + 1/2; the upper and the next byte of m + 1/2 in float32; the level's index.
    """
    start = cell_offset(book)
    assert start is not None
    cells = [cell + start for cell in _threshold_cells(book)]
    carry = np.zeros(8, np.uint8)
    for cell in cells:
        carry[cell // RUN] = RUN - cell % RUN
    index = np.searchsorted(cells, RUN * np.arange(8))
    odd = 2 * np.asarray(book.levels)[index] + 1
    level = (odd / 2).astype(np.float32).view(np.uint32)
    return np.stack([carry, odd, level >> 24, level >> 16 & 255, index]).astype(np.uint8).view(np.int32).ravel()


def fraction_bits(book: Codebook) -> int:
    """Bits k for which s * 2**k, rounded, fits into three bytes: magnitudes s are below 1 / step, up to rounding."""
    return math.floor(24 + math.log2(book.step) - 1e-3)


def cut_ptx(book: Codebook) -> Assembly:
    """The three bytes of four magnitudes s, given as steps times SMALL and rounded to multiples of 2**-fraction_bits.

    Returns:
        PTX with the results `low`, `middle` and `high`, each with a byte per channel.
    """
    unit = float_constant(2.0 ** (fraction_bits(book) - 149) / SMALL)
    lines = [f"abs.f32 m, $y{i};\nmul.rn.f32 m, m, {unit};\nmov.b32 n{i}, m;" for i in range(4)]
    lines += [f"prmt.b32 a, n0, n1, {INTERLEAVED_LOWER_HALVES};", f"prmt.b32 b, n2, n3, {INTERLEAVED_LOWER_HALVES};"]
    lines += [f"prmt.b32 $low, a, b, {LOWER_HALVES};", f"prmt.b32 $middle, a, b, {UPPER_HALVES};"]
    lines += [f"prmt.b32 a, n0, n1, {THIRD_BYTES};", f"prmt.b32 b, n2, n3, {THIRD_BYTES};"]
    lines.append(f"prmt.b32 $high, a, b, {LOWER_HALVES};")
    return assembly(
        block(".reg .f32 m;\n.reg .b32 n<4>, a, b;", lines),
        results=dict.fromkeys(("low", "middle", "high"), "=&r"),
        arguments=CHANNELS,
    )


def sums_ptx(book: Codebook, quads: int) -> Assembly:
    """Sums over the channels of several quads, of levels q nearest to |y| * factor.

    Args:
        book: The codebook.
        quads: Number of quads: arguments `y<i>_<quad>` and their bytes `low_<quad>`, `middle_<quad>`, `high_<quad>`.

    Returns:
        PTX with the results `low` and `upper`, of which low + 256 * upper is the sum of 2q times the magnitudes that
        `cut_ptx` cut, and `squared`, the sum of (2q)**2.
    """
    lines = []
    for k in range(quads):
        lines += [f"abs.f32 m{i}, $y{i}_{k};" for i in range(4)] + _cells("$factor", book) + _carried()
        lines.append(_look_up("l", "odd"))
        for byte, total in (("low", "$low"), ("middle", "d"), ("high", "e")):
            lines.append(f"dp4a.u32.u32 {total}, ${byte}_{k}, l, {total if k else 0};")
        lines.append(f"dp4a.u32.u32 $squared, l, l, {'$squared' if k else 0};")
    lines.append("mad.lo.u32 $upper, e, 256, d;")
    arguments = {"factor": "f", **_table_words(TABLES[:2])}
    for k in range(quads):
        arguments |= {f"y{i}_{k}": "f" for i in range(4)} | {f"{byte}_{k}": "r" for byte in ("low", "middle", "high")}
    return assembly(
        block(".reg .f32 m<4>;\n.reg .b32 n<4>, x, y, l, d, e;", lines),
        results=dict.fromkeys(("low", "upper", "squared"), "=&r"),
        arguments=arguments,
    )


def codes_ptx(book: Codebook) -> Assembly:
    """Codes of four channels, of levels q nearest to |y| * factor.

    Returns:
        PTX with the results `along`, the sum of |y| * q, `squared`, the sum of (2q)**2, and `codes` (four bytes);
        `factor` makes steps times SMALL of y.
    """
    lines = [f"abs.f32 m{i}, $y{i};\nmul.f32 m{i}, m{i}, $factor;" for i in range(4)]
    lines += [f"mov.f32 s, {float_constant(CELLS / SMALL)};", *_cells("s", book), *_carried()]
    lines += [_look_up("l", "odd"), "dp4a.u32.u32 $squared, l, l, 0;"]
    lines += [_look_up("h", "upper"), _look_up("l", "next"), _look_up("x", "index")]
    for i in range(4):
        lines.append(f"prmt.b32 w, h, l, {upper_bytes_of_float(i)};\nmov.b32 s, w;\nabs.f32 m0, $y{i};")
        lines.append("fma.rn.f32 $along, m0, s, $along;" if i else "mul.f32 $along, m0, s;")
    lines += [f"prmt.b32 w, $y0, $y1, {SIGN_BYTES};", f"prmt.b32 h, $y2, $y3, {SIGN_BYTES};"]
    lines.append(f"prmt.b32 w, w, h, {LOWER_HALVES};")
    lines += [f"and.b32 w, w, {word(EVERY_BYTE << (book.bits - 1))};", "xor.b32 $codes, x, w;"]
    return assembly(
        block(".reg .f32 m<4>, s;\n.reg .b32 n<4>, x, y, l, h, w;", lines),
        results={"along": "=&f", "squared": "=&r", "codes": "=&r"},
        arguments={**CHANNELS, "factor": "f", **_table_words(TABLES)},
    )


def _table_words(names: Sequence[str]) -> dict[str, str]:
    """Arguments for the two words of each table."""
    return {f"{name}_{half}": "r" for name in names for half in ("low", "high")}


def _cells(factor: str, book: Codebook) -> list[str]:
    """Instructions that put the cells of m0 to m3, with the offset, into the bytes of x."""
    start = cell_offset(book) or 0
    lines = [f"fma.rz.f32 m{i}, m{i}, {factor}, 0f{start:08X};\nmov.b32 n{i}, m{i};" for i in range(4)]
    return [*lines, "cvt.pack.sat.u8.s32.b32 x, n3, n2, 0;", "cvt.pack.sat.u8.s32.b32 x, n1, n0, x;"]


def _carried() -> list[str]:
    """Instructions that carry the cells x above the threshold of their run into the next; y: selectors of the runs."""
    return [*_run_selectors(), _look_up("y", "carry"), "add.u32 x, x, y;", *_run_selectors()]


def _run_selectors() -> list[str]:
    """Instructions that put the upper three bits of the bytes of x into y, as `prmt` takes them.

    The upper half of the product with 2**27 + 2**23 has the bytes shifted down by 5 and by 9 bits: the runs of bytes 0
    and 1 meet in one byte, those of bytes 2 and 3 in another.
    """
    gather = ["and.b32 y, x, 0xE0E0E0E0;", f"mul.hi.u32 y, y, {1 << 27 | 1 << 23};"]
    return [*gather, f"prmt.b32 y, y, y, {EVEN_BYTES};"]


def _look_up(out: str, table: str) -> str:
    """The instruction that looks up the runs y in a table."""
    return f"prmt.b32 {out}, ${table}_low, ${table}_high, y;"
