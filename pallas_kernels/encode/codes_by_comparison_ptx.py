"""PTX of codes by comparison: the instructions for the four channels of a quad.

Levels are counted in half precision, two channels per instruction. With GAIN = 512, fma.sat(h, 512, -512 t) is one for
every float16 h above the float16 t, and zero for the others.

Registers of the texts, where i is a channel (0 to 3) and p a pair of channels (0 to 1):

    m<i>  float32 magnitude                      h<p>  magnitudes of a pair, float16
    l<i>  float32 level, m + 1/2                 v<p>  levels of a pair, float16
    c     indices of the four levels, in bytes   k<p>  1024 + the indices of a pair, float16: index in the low byte
"""

import numpy as np

from pallas_kernels.format import Codebook
from pallas_kernels.numerics import HALF_ANCHOR, UNSIGNED_ANCHOR
from pallas_kernels.tiles.ptx import (
    EVEN_BYTES,
    EVEN_BYTES_OF_BOTH,
    EVERY_BYTE,
    FIRST_BYTES,
    INTERLEAVED_LOWER_HALVES,
    INTERLEAVED_UPPER_HALVES,
    LOWER_HALVES,
    SIGN_BYTES,
    Assembly,
    assembly,
    block,
    float_constant,
    half_pair,
    upper_bytes_of_float,
    word,
)

GAIN = 512.0
"""Factor of differences of float16 numbers from thresholds: those that are not zero become one at least."""

LARGEST_TABLE = 8
"""Levels that one `prmt` finds."""

LARGEST_CELL = 127.5
"""Magnitudes of the uniform grid of 8 bits are cut here, inside the last cell."""

CHANNELS = {f"y{i}": "f" for i in range(4)}
"""The four channels of a quad, as arguments."""


def squares_ptx() -> Assembly:
    """Sum of the squares of four channels."""
    text = (
        "mul.f32 $sum, $y0, $y0; fma.rn.f32 $sum, $y1, $y1, $sum; "
        "fma.rn.f32 $sum, $y2, $y2, $sum; fma.rn.f32 $sum, $y3, $y3, $sum;"
    )
    return assembly(text, results={"sum": "=&f"}, arguments=CHANNELS)


def codes_ptx(book: Codebook, *, searching: bool, codes: bool) -> Assembly:
    """Levels q nearest to the magnitudes s = |y| * factor of four channels.

    Args:
        book: The codebook.
        searching: Whether `along` is the sum of |y| * q instead of s * q.
        codes: Whether the result `codes` exists.

    Returns:
        PTX with the results `along` (sum of s * q), `squared` (sum of q * q) and `codes` (four bytes).
    """
    lines = [f"abs.f32 m{i}, $y{i};\nmul.f32 m{i}, m{i}, $factor;" for i in range(4)]
    lines += _uniform_levels() if book.bits == 8 else _counted_levels(book, codes)
    if searching:
        # The gains of a fine grid differ by little more than rounding, so their sums are of exact terms.
        lines += [f"abs.f32 m{i}, $y{i};" for i in range(4)]
    lines += ["mul.f32 $along, m0, l0;", "mul.f32 $squared, l0, l0;"]
    for i in (1, 2, 3):
        lines.append(f"fma.rn.f32 $along, m{i}, l{i}, $along;\nfma.rn.f32 $squared, l{i}, l{i}, $squared;")
    results = {"along": "=&f", "squared": "=&f"}
    if codes:
        results["codes"] = "=&r"
        sign = 0xFFFFFFFF if book.bits == 8 else EVERY_BYTE << (book.bits - 1)
        lines += [f"prmt.b32 a, $y0, $y1, {SIGN_BYTES};", f"prmt.b32 b, $y2, $y3, {SIGN_BYTES};"]
        lines += [f"prmt.b32 a, a, b, {LOWER_HALVES};", f"and.b32 a, a, {word(sign)};", "xor.b32 $codes, c, a;"]
    declared = ".reg .f32 m<4>, l<4>;\n.reg .b32 h<2>, v<2>, k<2>, t, a, b, c, d, e, f;\n.reg .b16 x, z;"
    return assembly(block(declared, lines), results=results, arguments={**CHANNELS, "factor": "f"})


def _counted_levels(book: Codebook, codes: bool) -> list[str]:
    """Levels and, for codes, indices; float16 holds thresholds, which are half-integers."""
    lines, table = [], codes and len(book.levels) == LARGEST_TABLE
    for pair in (0, 1):
        # Rounding towards zero keeps the order of a magnitude and any number that float16 holds.
        lines.append(f"cvt.rz.f16x2.f32 h{pair}, m{2 * pair + 1}, m{2 * pair};\nmov.b32 e, {half_pair(GAIN)};")
        lines.append(f"mov.b32 v{pair}, {half_pair(book.levels[0] + 0.5)};\nmov.b32 k{pair}, {half_pair(HALF_ANCHOR)};")
        for threshold, gap in zip(book.thresholds, np.diff(book.levels), strict=True):
            # A magnitude at the threshold passes it: it is above the float16 below the threshold.
            below = np.nextafter(np.float16(threshold), np.float16(0))
            lines.append(f"mov.b32 t, {half_pair(-GAIN * float(below))};\nfma.rn.sat.f16x2 t, h{pair}, e, t;")
            if not table:
                lines.append(f"mov.b32 f, {half_pair(float(gap))};\nfma.rn.f16x2 v{pair}, t, f, v{pair};")
            if codes:
                lines.append(f"add.rn.f16x2 k{pair}, k{pair}, t;")
    if codes:
        lines.append(f"prmt.b32 c, k0, k1, {EVEN_BYTES_OF_BOTH};")
    if table:
        lines += _looked_up_levels(book)
    for pair in (0, 1):
        lines.append(f"mov.b32 {{x, z}}, v{pair};\ncvt.f32.f16 l{2 * pair}, x;\ncvt.f32.f16 l{2 * pair + 1}, z;")
    return lines


def _looked_up_levels(book: Codebook) -> list[str]:
    """Levels v0 and v1 by the indices c: eight bytes are the table of one instruction."""
    tables = (np.asarray(book.levels, np.float16) + np.float16(0.5)).view(np.uint8).reshape(LARGEST_TABLE, 2)
    # Selectors of `prmt` have four bits each, side by side in the lower half of a register.
    lines = ["shr.u32 a, c, 4;", "or.b32 a, a, c;", f"prmt.b32 a, a, a, {EVEN_BYTES};"]
    # The lower bytes of the four levels go to b, the upper ones to d.
    for name, table in (("b", tables[:, 0]), ("d", tables[:, 1])):
        low, high = _words(table)
        lines.append(f"mov.b32 t, {low};\nmov.b32 f, {high};\nprmt.b32 {name}, t, f, a;")
    return [
        *lines,
        f"prmt.b32 v0, b, d, {INTERLEAVED_LOWER_HALVES};",
        f"prmt.b32 v1, b, d, {INTERLEAVED_UPPER_HALVES};",
    ]


def _uniform_levels() -> list[str]:
    """Levels and indices on the uniform grid of 8 bits: a sum that is rounded down has the index as its low byte."""
    lines = []
    for i in range(4):
        lines.append(f"min.f32 l{i}, m{i}, {float_constant(LARGEST_CELL)};")
        lines.append(f"add.rm.f32 l{i}, l{i}, {float_constant(UNSIGNED_ANCHOR)};")
    lines += [f"mov.b32 {name}, l{i};" for i, name in enumerate("abtf")]
    lines += [f"prmt.b32 a, a, b, {FIRST_BYTES};", f"prmt.b32 b, t, f, {FIRST_BYTES};"]
    lines.append(f"prmt.b32 c, a, b, {LOWER_HALVES};")
    return lines + [f"sub.f32 l{i}, l{i}, {float_constant(UNSIGNED_ANCHOR - 0.5)};" for i in range(4)]


def levels_ptx(book: Codebook) -> Assembly:
    """Levels of four codes, with the signs of the channels.

    Args:
        book: A codebook of at most LARGEST_TABLE levels.

    Returns:
        PTX with the results `level0` to `level3`; `codes` has a code in each byte, whose own sign bit is not read.
    """
    # Tables of the upper and of the next byte of a float32; the other bytes of the levels are zero.
    levels = np.zeros(LARGEST_TABLE, np.float32)
    levels[: len(book.levels)] = np.asarray(book.levels) + 0.5
    tables = levels.view(np.uint8).reshape(LARGEST_TABLE, 4)
    lines = [f"and.b32 a, $codes, {word(EVERY_BYTE * (len(book.levels) - 1))};"]
    lines += ["shr.u32 b, a, 4;", "or.b32 a, a, b;", f"prmt.b32 a, a, a, {EVEN_BYTES};"]
    for name, table in (("h", tables[:, 3]), ("l", tables[:, 2])):
        low, high = _words(table)
        lines.append(f"mov.b32 b, {low};\nmov.b32 c, {high};\nprmt.b32 {name}, b, c, a;")
    for i in range(4):
        # The sign bit of the channel joins the positive level.
        lines.append(f"prmt.b32 b, h, l, {upper_bytes_of_float(i)};\nmov.b32 c, $y{i};")
        lines.append(f"and.b32 c, c, 0x80000000;\nor.b32 b, b, c;\nmov.b32 $level{i}, b;")
    return assembly(
        block(".reg .b32 a, b, c, h, l;", lines),
        results={f"level{i}": "=&f" for i in range(4)},
        arguments={**CHANNELS, "codes": "r"},
    )


def _words(table: np.ndarray) -> list[str]:
    """Eight bytes as the two registers of a table of `prmt`."""
    return [word(int(x)) for x in np.ascontiguousarray(table).view(np.uint32)]
