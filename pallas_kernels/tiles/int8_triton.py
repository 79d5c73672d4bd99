"""From packed bytes to int8 tiles inside a Pallas Triton kernel, four elements per register.

The codes of a tile of channels lie in one tile of bytes per plane (see `pallas_kernels.packing`): element j of the tile
is field `Field.field + shift[j]` of byte j of the plane; if all elements share one field, there is no shift. Each
function builds PTX around `prmt.b32`, which picks four bytes of an 8-byte table by four 3-bit indices, and has a jnp
twin for interpret mode, where inline PTX does not run.

Words:

    mixed   two tiles whose fields share the nibbles of the same bytes come out of the same lookups unsorted, each
            mixed tile with elements of both (see `tiles.layout`, and `mixed_index` for the order)
    again   the tile is looked up a second time, by code that the compiler does not recognize as the same: a decoded
            tile may enter one product only
    apart   the four elements of a register need not be neighbours, so that each may be of a different field
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.format import Codebook
from pallas_kernels.lookup import integers

SUPPORTED_BITS = (1, 2, 3, 4, 8)
"""Widths of codebook codes that have a lookup."""

_HALVES = {0: "0x6420", 1: "0x7531"}
"""Selectors that gather the bytes of even (low nibbles) and odd (high nibbles) lookups."""

_SIGN_MASKS, _SELECT = "0xba98", "0xca"
"""Selector that spreads the top bit of each byte over the byte; lop3 table of bits of b where a is set, c elsewhere."""

_MIXED_SIGNS = ("0xd9c8", "0xfbea")
"""Selectors of sign masks of mixed tiles: low and high nibbles in turn, of the lower and of the upper two bytes."""

PAIR_DISTANCE = {2: 2, 3: 2, 4: 1}
"""Distance, in fields, of the two fields that share the nibbles of a byte in one lookup, by bits per code."""


@dataclasses.dataclass(frozen=True)
class Field:
    """Bytes of one plane that hold the codes of a tile.

    Attributes:
        data: uint8 [tile, width] (keys) or [width, tile] (values), one byte per element.
        width: Bits per field.
        field: Static number of the field.
        shift: int8, in the shape of data, fields to add for each element; None for zero.
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

    Args:
        planes: The planes of the codes in storage order.
        book: The codebook.
        interpret: Whether to compute in jnp.
        mixed: None for this tile alone; 0 or 1 for a half of it and its partner, PAIR_DISTANCE fields on, mixed as
            `mixed_index` says.
        again: Whether to hide from the compiler that this tile was looked up before.
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
    """PTX that turns p0 (and p1, the second plane), four bytes each, into four int8 in $0; see `codebook_tile`."""
    if book.bits == 1:
        return _signs_ptx(book.levels, *fields)
    build = {2: _two_bits_ptx, 3: _three_bits_ptx, 4: _four_bits_ptx}[book.bits]
    return build(book.levels, *fields, mixed)


def mixed_index(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per element number i of a mixed tile of half 0: whether the partner has it, and where; add 2 for half 1."""
    return (i & 1) == 1, (i & ~3) | ((i & 3) >> 1)


def _mixed_twin(planes: Sequence[Field], book: Codebook, half: int) -> jax.Array:
    """The jnp twin of a mixed tile, [tile, width]."""
    fields = [
        dataclasses.replace(p, field=p.field + PAIR_DISTANCE[book.bits] * (2 if p.width == 1 else 1)) for p in planes
    ]
    tiles = [integers(_codes(planes), book), integers(_codes(fields), book)]  # [tile, width] each
    partner, place = mixed_index(jnp.arange(tiles[0].shape[1], dtype=jnp.int32))  # [width] each
    first, second = (jnp.take(tile, place + 2 * half, axis=1) for tile in tiles)
    return jnp.where(partner[None, :], second, first)


def integer_tile(plane: Field, *, interpret: bool, again: bool = False, apart: bool = False) -> jax.Array:
    """Unsigned codes of min-max groups less 2**(width - 1), int8 [width, tile]; see `codebook_tile`."""
    if interpret:
        return lax.bitcast_convert_type(_codes([plane]), jnp.int8) - jnp.int8(1 << (plane.width - 1))
    return _inline([plane], integer_ptx(plane.width, plane.field), again=again, apart=apart)


def integer_ptx(width: int, field: int) -> str:
    """PTX that turns four bytes in p0 into four int8 in $0; see `integer_tile`."""
    middle, top = 1 << (width - 1), repeated_byte(0x80)
    # The top bit keeps the borrow of the subtraction inside its byte.
    return (
        f"shr.b32 a, p0, {width * field};\nand.b32 a, a, {repeated_byte(2 * middle - 1)};\n"
        f"or.b32 a, a, {top};\nsub.u32 a, a, {repeated_byte(middle)};\nxor.b32 $0, a, {top};"
    )


def _codes(planes: Sequence[Field]) -> jax.Array:
    """The jnp twin: whole codes from their planes, uint8 in the shape of the planes' tiles."""
    codes, low = jnp.zeros(planes[0].data.shape, jnp.uint8), 0
    for plane in planes:
        count = jnp.full(codes.shape, plane.field, jnp.uint8)
        if plane.shift is not None:
            count = count + lax.bitcast_convert_type(plane.shift, jnp.uint8)
        codes = codes | (((plane.data >> (count * plane.width)) & ((1 << plane.width) - 1)) << low)
        low += plane.width
    return codes


def _inline(planes: Sequence[Field], body: str, *, again: bool = False, apart: bool = False) -> jax.Array:
    """Runs PTX over registers of four elements. It reads p0 and p1 (planes), writes $0 and may use a, b, c, d, t, u."""
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
    """PTX that shifts four neighbours, which lie in one run of fields, by the shift of the first one."""
    times = f"mul.lo.u32 t, t, {plane.width};\n" if plane.width > 1 else ""
    return f"and.b32 t, {shift}, 31;\n{times}shr.b32 {out}, {data}, t;\n"


def shift_ptx(plane: Field, out: str, data: str, shift: str) -> str:
    """PTX that shifts each of four bytes down by its own number of fields; bits of the next byte move into the top."""
    text = f"mov.b32 {out}, {data};\n"
    for bit in range(plane.last.bit_length()):
        # Triton also chooses layouts in which the four elements of a thread are no neighbours.
        text += _spread(shift, bit)
        text += f"shr.b32 u, {out}, {plane.width << bit};\nlop3.b32 {out}, t, u, {out}, {_SELECT};\n"
    return text


def repeated_byte(byte: int) -> str:
    """A byte in all four bytes of an immediate."""
    return f"0x{(byte & 0xFF) * 0x01010101:08x}"


def _table(entries: Sequence[int]) -> str:
    """Four bytes as an immediate, the first lowest."""
    return f"0x{sum((entry & 0xFF) << (8 * i) for i, entry in enumerate(entries)):08x}"


def _look_up(index: str, first: str, second: str, field: int, mixed: int | None) -> str:
    """PTX that looks up nibbles into u: the field's of all four bytes or, mixed, both of the lower or upper two bytes.

    Args:
        index: PTX that writes the nibbles to a.
        first: Bytes 0 to 3 of the table.
        second: Bytes 4 to 7 of the table.
        field: 0 for the low nibbles, 1 for the high ones.
        mixed: See `codebook_tile`.
    """
    # The assembler would copy a known constant anew for every use. It does not know that %lanemask_lt >> 31 is zero.
    table = f"mov.u32 t, %lanemask_lt;\nshr.u32 t, t, 31;\nxor.b32 t, t, {first};\nmov.b32 u, {second};\n"
    lower, upper = "prmt.b32 c, t, u, a;\n", "shr.b32 b, a, 16;\nprmt.b32 d, t, u, b;\n"
    if mixed is None:
        return f"{index}\n{table}{lower}{upper}prmt.b32 u, c, d, {_HALVES[field]};\n"
    return f"{index}\n{table}" + (lower + "mov.b32 u, c;\n", upper + "mov.b32 u, d;\n")[mixed]


def _spread(register: str, bit: int) -> str:
    """PTX that copies one bit of each byte to all bits of the byte, in t."""
    return f"shl.b32 t, {register}, {7 - bit};\nprmt.b32 t, t, t, {_SIGN_MASKS};\n"


def _signs_ptx(levels: Sequence[int], field: int) -> str:
    """PTX for codes of 1 bit: the sign alone."""
    return _spread("p0", field) + f"xor.b32 $0, t, {repeated_byte(levels[0])};"


def _two_bits_ptx(levels: Sequence[int], field: int, mixed: int | None) -> str:
    """PTX for codes of 2 bits: a table of four entries holds both signs."""
    table = _table([*levels, ~levels[0], ~levels[1]])
    index = f"shr.b32 a, p0, {2 * (field % 2)};\nand.b32 a, a, {repeated_byte(0x33)};"
    return _look_up(index, table, table, field // 2, mixed) + "mov.b32 $0, u;"


def _three_bits_ptx(levels: Sequence[int], field: int, bit: int, mixed: int | None) -> str:
    """PTX for codes of 3 bits: magnitudes of 2 bits in p0, signs in p1, where they are field `bit`."""
    # The sign goes to bit 2 of the nibble, so that one table of eight holds both signs.
    move = 2 + 4 * (field // 2) - bit
    sign = f"shl.b32 c, p1, {move};" if move >= 0 else f"shr.b32 c, p1, {-move};"
    index = (
        f"shr.b32 a, p0, {2 * (field % 2)};\nand.b32 a, a, {repeated_byte(0x33)};\n{sign}\n"
        f"and.b32 c, c, {repeated_byte(0x44)};\nor.b32 a, a, c;"
    )
    return _look_up(index, _table(levels), _table([~m for m in levels]), field // 2, mixed) + "mov.b32 $0, u;"


def _four_bits_ptx(levels: Sequence[int], field: int, mixed: int | None) -> str:
    """PTX for codes of 4 bits: a table of eight magnitudes, then NOT where the sign is set."""
    lookup = _look_up(f"and.b32 a, p0, {repeated_byte(0x77)};", _table(levels[:4]), _table(levels[4:]), field, mixed)
    # Signs are the top bits of bytes: of the register for high nibbles, of the register shifted by 4 for low ones.
    signs = _spread("p0", 3 + 4 * field)
    if mixed is not None:
        signs = f"shl.b32 t, p0, 4;\nprmt.b32 t, t, p0, {_MIXED_SIGNS[mixed]};\n"
    return lookup + signs + "xor.b32 $0, u, t;"
