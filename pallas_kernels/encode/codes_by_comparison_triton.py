"""Codes of four channels at a time: the instructions of channels j, j + n, j + 2n and j + 3n together.

A quad is four tiles [tile, n] of such channels, so that the fields of a packed byte are in one thread: packing is a
shift and an or, and sums over channels begin with three fused multiply-adds. Levels are counted in half precision, two
channels an instruction: fma.sat(h, 512, -512 t) is one above the threshold t and zero below.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat.patches import elementwise_assembly
from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.format import Codebook, CodebookFormat
from pallas_kernels.numerics import UNSIGNED_ANCHOR
from pallas_kernels.packing import plane_widths
from pallas_kernels.tiles.intrinsics_triton import hexadecimal

Quad = Sequence[jax.Array]
GAIN = 512.0
"""What differences of half-precision numbers from thresholds are multiplied by: one at the least, if not zero."""

LARGEST_HELD = 128
"""Channels of vectors that fit into registers with what a search, or a residual, needs beside them."""

LARGEST_TABLE = 8
"""Levels that one instruction finds."""

LEAST_WIDTH, LEAST_THRESHOLD, LARGEST_THRESHOLD = 16, 4.0, 127.0


def tile_width(encoder: Encoder) -> int:
    """Channels of the tiles of consecutive channels that make quads; 0 if quads do not hold these vectors."""
    fmt = encoder.format
    if not isinstance(fmt, CodebookFormat) or len(fmt.segments) != 1:
        return 0
    [book] = fmt.segments
    if fmt.residual and (len(book.levels) > LARGEST_TABLE or not encoder.hadamard):
        return 0
    # A byte of a 1-bit plane holds eight channels, of two quads.
    least = 8 if 1 in plane_widths(book.bits) else 4
    if book.dim & (book.dim - 1) or book.dim // least < LEAST_WIDTH:
        return 0
    if book.bits < 8 and not all(LEAST_THRESHOLD <= t <= LARGEST_THRESHOLD for t in book.thresholds):
        return 0
    if book.dim > LARGEST_HELD and (encoder.search or fmt.residual):
        return 0
    return LEAST_WIDTH if encoder.hadamard else book.dim // least


def quads(tiles: Sequence[jax.Array]) -> list[Quad]:
    """The quads of the tiles of consecutive runs of channels."""
    apart = len(tiles) // 4
    return [tiles[i::apart] for i in range(apart)]


def tiles(parts: Sequence[Quad]) -> list[jax.Array]:
    """The tiles that `quads` took."""
    return [part[i] for i in range(4) for part in parts]


def squares(parts: Sequence[Quad], *, interpret: bool) -> jax.Array:
    """Sums of squares of each row."""
    if interpret:
        return jnp.sum(sum(y * y for quad in parts for y in quad), axis=1)
    text = "mul.f32 $0, $1, $1; fma.rn.f32 $0, $2, $2, $0; fma.rn.f32 $0, $3, $3, $0; fma.rn.f32 $0, $4, $4, $0;"
    out = [elementwise_assembly(text, "=&f,f,f,f,f", quad, (jnp.float32,))[0] for quad in parts]
    return jnp.sum(sum(out[1:], out[0]), axis=1)


def scaled(parts: Sequence[Quad], factor: jax.Array) -> list[Quad]:
    """Rows times their factors."""
    return [[y * factor[:, None] for y in quad] for quad in parts]


def sums(
    parts: Sequence[Quad], factor: jax.Array, book: Codebook, *, searching: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Of the levels q nearest to s = |y| * factor, <s, q> (<|y|, q> when searching) and <q, q> of each row."""
    return _encoded(parts, factor, book, searching, codes=False, interpret=interpret)[1:]


def codes(
    parts: Sequence[Quad], factor: jax.Array, book: Codebook, *, searching: bool, interpret: bool
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Codes of each quad, the four bytes of an int32 tile, and the sums."""
    return _encoded(parts, factor, book, searching, codes=True, interpret=interpret)


def _encoded(
    parts: Sequence[Quad], factor: jax.Array, book: Codebook, searching: bool, *, codes: bool, interpret: bool
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    wide = jnp.broadcast_to(factor[:, None], parts[0][0].shape)
    encode = _interpreted if interpret else functools.partial(_compiled, codes=codes)
    found = [encode(quad, wide, book, searching) for quad in parts]
    along, squared = (sum((x[i] for x in found[1:]), found[0][i]) for i in (0, 1))
    return [x[2] for x in found if codes], jnp.sum(along, axis=1), jnp.sum(squared, axis=1)


def residuals(
    parts: Sequence[Quad],
    factor: jax.Array,
    found: Sequence[jax.Array],
    gain: jax.Array,
    book: Codebook,
    interpret: bool,
) -> list[Quad]:
    """Rows y times their factors less the levels of their codes times their gains."""
    if not found:
        return scaled(parts, factor)
    levels = _interpreted_levels if interpret else _compiled_levels
    out = []
    for quad, code in zip(scaled(parts, factor), found, strict=True):
        out.append([y - level * gain[:, None] for y, level in zip(quad, levels(quad, code, book), strict=True)])
    return out


def _compiled_levels(quad: Quad, code: jax.Array, book: Codebook) -> list[jax.Array]:
    text = "{\n.reg .b32 a, b, c, h, l;\n" + level_ptx(book) + "\n}"
    constraints = ",".join(["=&f"] * 4 + ["f"] * 4 + ["r"])
    return elementwise_assembly(text, constraints, [*quad, code], (jnp.float32,) * 4)


def level_ptx(book: Codebook) -> str:
    """PTX for the levels $0 to $3 of the codes in the bytes of $8, with the signs of $4 to $7."""
    # Tables of the upper and of the next byte of a float; the others are zero.
    levels = np.zeros(LARGEST_TABLE, np.float32)
    levels[: len(book.levels)] = np.asarray(book.levels) + 0.5
    tables = levels.view(np.uint8).reshape(LARGEST_TABLE, 4)
    lines = [f"and.b32 a, $8, 0x{0x01010101 * (len(book.levels) - 1):08X};", "shr.u32 b, a, 4;", "or.b32 a, a, b;"]
    lines.append("prmt.b32 a, a, a, 0x0020;")
    for name, byte in (("h", 3), ("l", 2)):
        low, high = np.ascontiguousarray(tables[:, byte]).view(np.uint32)
        lines.append(f"mov.b32 b, 0x{low:08X};\nmov.b32 c, 0x{high:08X};\nprmt.b32 {name}, b, c, a;")
    for i in range(4):
        # Zeros are the sign of the upper byte.
        lines.append(f"prmt.b32 b, h, l, 0x{i:X}{4 + i:X}{8 + i:X}{8 + i:X};\nmov.b32 c, ${4 + i};")
        lines.append(f"and.b32 c, c, 0x80000000;\nor.b32 b, b, c;\nmov.b32 ${i}, b;")
    return "\n".join(lines)


def _interpreted_levels(quad: Quad, code: jax.Array, book: Codebook) -> list[jax.Array]:
    """What `level_ptx` gives."""
    out = []
    for i, y in enumerate(quad):
        index, level = (code >> (8 * i)) & (len(book.levels) - 1), jnp.full(y.shape, book.levels[0] + 0.5, jnp.float32)
        for k, gap in enumerate(np.diff(book.levels)):
            level = level + jnp.where(index > k, np.float32(gap), np.float32(0))
        out.append(jnp.where(y < 0, -level, level))
    return out


def packed(found: Sequence[jax.Array], bits: int) -> list[tuple[int, jax.Array]]:
    """Bytes, in the low bits of int32, of runs of consecutive bytes of a vector, and the first byte of each run."""
    if not found:
        return []
    out, first, shift, size = [], 0, 0, found[0].shape[1]
    for width in plane_widths(bits):
        fields = [(code >> shift) & (((1 << width) - 1) * 0x01010101) if width < bits else code for code in found]
        if width == 1:
            half = len(fields) // 2
            fields = [fields[i] | (fields[i + half] << 1) for i in range(half)]
        for i, code in enumerate(fields):
            if width == 8:
                run = [code >> (8 * k) for k in range(4)]
            elif width == 4:
                both = code | (code >> 12)
                run = [both, both >> 8]
            else:
                pairs = code | (code >> 6)
                run = [pairs | (pairs >> 12)]
            out += [(first + (k * len(fields) + i) * size, byte) for k, byte in enumerate(run)]
        first, shift = first + len(fields) * len(run) * size, shift + width
    return out


def _compiled(quad: Quad, factor: jax.Array, book: Codebook, searching: bool, *, codes: bool) -> list[jax.Array]:
    """Sums over the quad and, if asked for, its codes."""
    types = (jnp.float32, jnp.float32) + ((jnp.int32,) if codes else ())
    first = len(types)
    y = [f"${first + i}" for i in range(4)]
    lines = [f"abs.f32 m{i}, {y[i]};\nmul.f32 m{i}, m{i}, ${first + 4};" for i in range(4)]
    lines += _bytes_and_levels() if book.bits == 8 else _counted(book, codes)
    if searching:
        # The gains of a fine grid differ by little more than rounding, so their sums are of exact terms.
        lines += [f"abs.f32 m{i}, {y[i]};" for i in range(4)]
    lines += ["mul.f32 $0, m0, l0;", "mul.f32 $1, l0, l0;"]
    lines += [f"fma.rn.f32 $0, m{i}, l{i}, $0;\nfma.rn.f32 $1, l{i}, l{i}, $1;" for i in (1, 2, 3)]
    if codes:
        # The sign of each channel, in all bits of its byte.
        lines += [f"prmt.b32 a, {y[0]}, {y[1]}, 0x00FB;", f"prmt.b32 b, {y[2]}, {y[3]}, 0x00FB;"]
        sign = 0xFFFFFFFF if book.bits == 8 else 0x01010101 << (book.bits - 1)
        lines += ["prmt.b32 a, a, b, 0x5410;", f"and.b32 a, a, 0x{sign:08X};", "xor.b32 $2, c, a;"]
    declared = ".reg .f32 m<4>, l<4>;\n.reg .b32 h<2>, v<2>, k<2>, t, a, b, c, d, e, f;\n.reg .b16 x, z;\n"
    constraints = ",".join(["=&f", "=&f", "=&r"][:first] + ["f"] * 5)
    text = "{\n" + declared + "\n".join(lines) + "\n}"
    return elementwise_assembly(text, constraints, (*quad, factor), types)


def _counted(book: Codebook, codes: bool) -> list[str]:
    """Levels l0 to l3 of m0 to m3 and, in the bytes of c, their indices; halves hold thresholds, half-integers."""
    lines, table = [], codes and len(book.levels) == 8
    for pair in (0, 1):
        # Rounding towards zero keeps every order with numbers that halves hold.
        lines.append(f"cvt.rz.f16x2.f32 h{pair}, m{2 * pair + 1}, m{2 * pair};\nmov.b32 e, {_halves(GAIN)};")
        lines.append(f"mov.b32 v{pair}, {_halves(book.levels[0] + 0.5)};\nmov.b32 k{pair}, {_halves(1024)};")
        for threshold, gap in zip(book.thresholds, np.diff(book.levels), strict=True):
            below = np.nextafter(np.float16(threshold), np.float16(0))
            lines.append(f"mov.b32 t, {_halves(-GAIN * float(below))};\nfma.rn.sat.f16x2 t, h{pair}, e, t;")
            if not table:
                lines.append(f"mov.b32 f, {_halves(float(gap))};\nfma.rn.f16x2 v{pair}, t, f, v{pair};")
            if codes:
                lines.append(f"add.rn.f16x2 k{pair}, k{pair}, t;")
    if codes:
        lines.append("prmt.b32 c, k0, k1, 0x6420;")
    if table:
        lines += _looked_up(book)
    for pair in (0, 1):
        lines.append(f"mov.b32 {{x, z}}, v{pair};\ncvt.f32.f16 l{2 * pair}, x;\ncvt.f32.f16 l{2 * pair + 1}, z;")
    return lines


def _looked_up(book: Codebook) -> list[str]:
    """Levels v0 and v1 by the indices in the bytes of c: eight bytes are a table of one instruction."""
    levels = (np.asarray(book.levels, np.float16) + np.float16(0.5)).view(np.uint8).reshape(8, 2)
    lines = ["shr.u32 a, c, 4;", "or.b32 a, a, c;", "prmt.b32 a, a, a, 0x0020;"]
    for name, column in (("b", 0), ("d", 1)):
        words = np.ascontiguousarray(levels[:, column]).view(np.uint32)
        lines.append(f"mov.b32 t, 0x{words[0]:08X};\nmov.b32 f, 0x{words[1]:08X};\nprmt.b32 {name}, t, f, a;")
    return [*lines, "prmt.b32 v0, b, d, 0x5140;", "prmt.b32 v1, b, d, 0x7362;"]


def _bytes_and_levels() -> list[str]:
    """Levels l0 to l3 of m0 to m3 on the uniform grid of 8 bits, their indices in the bytes of c."""
    lines = []
    for i in range(4):
        lines.append(
            f"min.f32 l{i}, m{i}, {hexadecimal(127.5)};\nadd.rm.f32 l{i}, l{i}, {hexadecimal(UNSIGNED_ANCHOR)};"
        )
    lines += [f"mov.b32 {name}, l{i};" for name, i in (("a", 0), ("b", 1), ("t", 2), ("f", 3))]
    lines += ["prmt.b32 a, a, b, 0x0040;", "prmt.b32 b, t, f, 0x0040;", "prmt.b32 c, a, b, 0x5410;"]
    return lines + [f"sub.f32 l{i}, l{i}, {hexadecimal(UNSIGNED_ANCHOR - 0.5)};" for i in range(4)]


def _halves(value: float) -> str:
    """A constant in both halves of a register."""
    bits = int(np.float16(value).view(np.uint16))
    return f"0x{bits | bits << 16:08X}"


def _interpreted(quad: Quad, factor: jax.Array, book: Codebook, searching: bool) -> tuple[jax.Array, ...]:
    """What `_compiled` gives."""
    along, squared, code = jnp.zeros_like(quad[0]), jnp.zeros_like(quad[0]), jnp.zeros(quad[0].shape, jnp.int32)
    for i, y in enumerate(quad):
        near = jnp.abs(y) * factor
        if book.bits == 8:
            index = jnp.floor(jnp.minimum(near, 127.5)).astype(jnp.int32)
            level = index.astype(jnp.float32) + 0.5
        else:
            index, level = jnp.zeros(y.shape, jnp.int32), jnp.full(y.shape, book.levels[0] + 0.5, jnp.float32)
            for threshold, gap in zip(book.thresholds, np.diff(book.levels), strict=True):
                passed = near >= threshold
                index = index + passed.astype(jnp.int32)
                level = level + jnp.where(passed, np.float32(gap), np.float32(0))
        index = index ^ jnp.where(y < 0, 255 if book.bits == 8 else 1 << (book.bits - 1), 0)
        along = along + (jnp.abs(y) if searching else near) * level
        squared, code = squared + level * level, code | (index << (8 * i))
    return along, squared, code
