"""From packed bytes to int8 tiles inside a Pallas Triton kernel, four elements a register.

The codes of a tile of channels are found in one byte tile a plane (see `pallas_kernels.packing`): element j of the tile
is field `Field.field + shift[j]` of byte j of the plane, where the shift is absent when all elements share one field.
Each function builds PTX around `prmt.b32`, which maps four 3-bit selectors to bytes of an 8-byte table, and has a jnp
twin for interpret mode, where inline PTX does not run.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.format import Codebook
from pallas_kernels.lookup import integers
from pallas_kernels.packing import plane_widths

SUPPORTED_BITS = (1, 2, 3, 4, 8)
"""Widths of codebook codes that have a lookup."""

_HALVES = {0: "0x6420", 1: "0x7531"}
"""Selectors that gather the bytes of even (low nibbles) and odd (high nibbles) lookups."""

PAIR_DISTANCE = {2: 2, 3: 2, 4: 1}
"""Fields between the two that share the nibbles of a byte in one lookup, by bits of a code."""


@dataclasses.dataclass(frozen=True)
class Field:
    """Bytes of one plane that hold the codes of a tile.

    Attributes:
        data: uint8 tile.
        width: Bits of a field.
        field: Static number of the field.
        shift: int8 tile of fields to add for each element; None for zero.
        last: Largest shift.
    """

    data: jax.Array
    width: int
    field: int
    shift: jax.Array | None
    last: int = 0


def codebook_tile(
    planes: Sequence[Field],
    book: Codebook,
    *,
    interpret: bool,
    mixed: int | None = None,
    again: bool = False,
    apart: bool = False,
) -> jax.Array:
    """The int8 integers m of a tile of codebook codes; the centroid is (m + 1/2) * book.step.

    Two tiles whose fields lie PAIR_DISTANCE apart in the same bytes come out of the same lookups. Along the channels of
    keys their elements need not be told apart, if the queries come in the same order (see `mixed_index`).

    Args:
        planes: The planes of the codes in storage order.
        book: The codebook.
        interpret: Whether to compute in jnp.
        mixed: None for this tile; 0 or 1 for a half of it and of its partner, mixed as `mixed_index` says.
        again: Whether the compiler shall not see that this tile was looked up before.
        apart: Whether the four elements of a register may be of different fields.

    Returns:
        int8, in the shape of the planes' tiles.

    Raises:
        NotImplementedError: For widths without a lookup.
    """
    if book.bits not in SUPPORTED_BITS:
        raise NotImplementedError(f"lookups exist for codes of {SUPPORTED_BITS} bits, got bits={book.bits}")
    if interpret:
        return integers(_codes(planes), book) if mixed is None else _mixed_twin(planes, book, mixed)
    if book.bits == 8:
        return lax.bitcast_convert_type(planes[0].data, jnp.int8) if not again else _inline(planes, "mov.b32 $0, p0;")
    return _inline(planes, lookup_ptx(book, [plane.field for plane in planes], mixed), again=again, apart=apart)


def lookup_ptx(book: Codebook, fields: Sequence[int], mixed: int | None = None) -> str:
    """PTX that turns p0 (and p1, the second plane) into int8 in $0; see `codebook_tile`."""
    if book.bits == 1:
        return _signs_ptx(book.levels, *fields)
    build = {2: _two_bits_ptx, 3: _three_bits_ptx, 4: _four_bits_ptx}[book.bits]
    return build(book.levels, *fields, mixed)


def mixed_index(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For elements of a mixed tile of half 0: whether it is the partner's, and its place; half 1 lies two further."""
    return (i & 1) == 1, (i & ~3) | ((i & 3) >> 1)


def _mixed_twin(planes: Sequence[Field], book: Codebook, half: int) -> jax.Array:
    fields = [
        dataclasses.replace(p, field=p.field + PAIR_DISTANCE[book.bits] * (2 if p.width == 1 else 1)) for p in planes
    ]
    tiles = [integers(_codes(planes), book), integers(_codes(fields), book)]
    partner, place = mixed_index(jnp.arange(tiles[0].shape[1], dtype=jnp.int32))
    first, second = (jnp.take(tile, place + 2 * half, axis=1) for tile in tiles)
    return jnp.where(partner[None, :], second, first)


def integer_tile(plane: Field, *, interpret: bool, again: bool = False, apart: bool = False) -> jax.Array:
    """Unsigned codes less 2**(width - 1) as an int8 tile (for min-max groups); see `codebook_tile`."""
    if interpret:
        return lax.bitcast_convert_type(_codes([plane]), jnp.int8) - jnp.int8(1 << (plane.width - 1))
    return _inline([plane], integer_ptx(plane.width, plane.field), again=again, apart=apart)


def integer_ptx(width: int, field: int) -> str:
    """PTX that turns p0 into int8 in $0; see `integer_tile`."""
    middle = 1 << (width - 1)
    # The top bit keeps the borrow of the subtraction inside its byte.
    return (
        f"shr.b32 a, p0, {width * field};\nand.b32 a, a, {_repeat(2 * middle - 1)};\n"
        f"or.b32 a, a, {_repeat(0x80)};\nsub.u32 a, a, {_repeat(middle)};\nxor.b32 $0, a, {_repeat(0x80)};"
    )


def _codes(planes: Sequence[Field]) -> jax.Array:
    """The jnp twin: whole codes from their planes."""
    codes, low = jnp.zeros(planes[0].data.shape, jnp.uint8), 0
    for plane in planes:
        count = jnp.full(codes.shape, plane.field, jnp.uint8)
        if plane.shift is not None:
            count = count + lax.bitcast_convert_type(plane.shift, jnp.uint8)
        codes = codes | (((plane.data >> (count * plane.width)) & ((1 << plane.width) - 1)) << low)
        low += plane.width
    return codes


def _inline(planes: Sequence[Field], body: str, *, again: bool = False, apart: bool = False) -> jax.Array:
    """Runs PTX over registers of four elements; it reads p0, p1 (planes), writes $0 and may use a, b, c, d, t, u."""
    arguments, prologue = [], ""
    shape = planes[0].data.shape
    for i, plane in enumerate(planes):
        arguments.append(plane.data)
        if plane.shift is None:
            prologue += f"mov.b32 p{i}, ${len(arguments)};\n"
            continue
        arguments.append(plane.shift)
        data, shift = f"${len(arguments) - 1}", f"${len(arguments)}"
        prologue += shift_ptx(plane, f"p{i}", data, shift) if apart else _shift_together(plane, f"p{i}", data, shift)
    body += "\n// again" if again else ""
    text = "{\n.reg .b32 p0, p1, a, b, c, d, t, u;\n" + prologue + body + "\n}"
    [out] = plt.elementwise_inline_asm(
        text,
        args=arguments,
        constraints=",".join(["=r"] + ["r"] * len(arguments)),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int8)],
    )
    return out


def _shift_together(plane: Field, out: str, data: str, shift: str) -> str:
    """PTX that shifts four neighbours, which lie in one run of fields, by what the first one shall be."""
    times = f"mul.lo.u32 t, t, {plane.width};\n" if plane.width > 1 else ""
    return f"and.b32 t, {shift}, 31;\n{times}shr.b32 {out}, {data}, t;\n"


def shift_ptx(plane: Field, out: str, data: str, shift: str) -> str:
    """PTX that shifts each of four bytes down by its own number of fields; its top bits become the neighbour's."""
    text = f"mov.b32 {out}, {data};\n"
    for bit in range(plane.last.bit_length()):
        # Triton also chooses layouts whose four elements of a thread are no neighbours.
        text += _spread(shift, bit) + f"shr.b32 u, {out}, {plane.width << bit};\nlop3.b32 {out}, t, u, {out}, 0xca;\n"
    return text


def _repeat(byte: int) -> str:
    return f"0x{(byte & 0xFF) * 0x01010101:08x}"


def _table(entries: Sequence[int]) -> str:
    """Four bytes as an immediate, the first lowest."""
    return f"0x{sum((entry & 0xFF) << (8 * i) for i, entry in enumerate(entries)):08x}"


def _look_up(index: str, first: str, second: str, field: int, mixed: int | None) -> str:
    """Looks up nibbles of a, into u: the field's in all bytes or, mixed, all those of the lower or upper two bytes."""
    # The assembler would copy a known constant anew for every use; it does not know that no lane lies below 31 others.
    table = f"mov.u32 t, %lanemask_lt;\nshr.u32 t, t, 31;\nxor.b32 t, t, {first};\nmov.b32 u, {second};\n"
    lower, upper = "prmt.b32 c, t, u, a;\n", "shr.b32 b, a, 16;\nprmt.b32 d, t, u, b;\n"
    if mixed is None:
        return f"{index}\n{table}{lower}{upper}prmt.b32 u, c, d, {_HALVES[field]};\n"
    return f"{index}\n{table}" + (lower + "mov.b32 u, c;\n", upper + "mov.b32 u, d;\n")[mixed]


def _spread(register: str, bit: int) -> str:
    """Copies one bit of each byte to all bits of the byte, in t; 0xba98 repeats the top bits."""
    return f"shl.b32 t, {register}, {7 - bit};\nprmt.b32 t, t, t, 0xba98;\n"


def _signs_ptx(levels: Sequence[int], field: int) -> str:
    return _spread("p0", field) + f"xor.b32 $0, t, {_repeat(levels[0])};"


def _two_bits_ptx(levels: Sequence[int], field: int, mixed: int | None) -> str:
    table = _table([*levels, ~levels[0], ~levels[1]])
    index = f"shr.b32 a, p0, {2 * (field % 2)};\nand.b32 a, a, 0x33333333;"
    return _look_up(index, table, table, field // 2, mixed) + "mov.b32 $0, u;"


def _three_bits_ptx(levels: Sequence[int], field: int, bit: int, mixed: int | None) -> str:
    # The sign goes to bit 2 of the nibble, so that one table of eight holds both signs.
    move = 2 + 4 * (field // 2) - bit
    sign = f"shl.b32 c, p1, {move};" if move >= 0 else f"shr.b32 c, p1, {-move};"
    index = (
        f"shr.b32 a, p0, {2 * (field % 2)};\nand.b32 a, a, 0x33333333;\n{sign}\n"
        "and.b32 c, c, 0x44444444;\nor.b32 a, a, c;"
    )
    return _look_up(index, _table(levels), _table([~m for m in levels]), field // 2, mixed) + "mov.b32 $0, u;"


def _four_bits_ptx(levels: Sequence[int], field: int, mixed: int | None) -> str:
    lookup = _look_up("and.b32 a, p0, 0x77777777;", _table(levels[:4]), _table(levels[4:]), field, mixed)
    # Signs are top bits of bytes of the register (high nibbles) and of itself four bits up (low nibbles).
    signs = _spread("p0", 3 + 4 * field)
    if mixed is not None:
        signs = f"shl.b32 t, p0, 4;\nprmt.b32 t, t, p0, {('0xd9c8', '0xfbea')[mixed]};\n"
    return lookup + signs + "xor.b32 $0, u, t;"


def plane_layout(bits: int, dim: int) -> tuple[tuple[int, int, int], ...]:
    """Width, first byte and bytes of each plane of the codes of a vector.

    Example:
        >>> plane_layout(3, 128)
        ((2, 0, 32), (1, 32, 16))
    """
    planes, start = [], 0
    for width in plane_widths(bits):
        size = -(-dim * width // 8)
        planes.append((width, start, size))
        start += size
    return tuple(planes)
