"""How kernels over pages cut vectors into tiles: static geometry, no arrays.

A part is a set of channels with one scale per token: a segment of a codebook format, a group of a min-max format, or
the signs of a sketch. Its channels are cut into tiles of power-of-two width along the runs that the planes of
`pallas_kernels.packing` give, so that a tile is one field of a contiguous run of bytes wherever possible.

Mixed tiles: one lookup of four bytes yields eight integers, four of one tile and four of another, its partner, whose
fields share the nibbles of the same bytes. If both tiles enter products that sum over the channels, the integers need
not be sorted: two mixed tiles hold the elements of both in the order that `int8_triton.mixed_index` gives, and queries
are loaded in the same order.
"""

import dataclasses

from pallas_kernels.format import Codebook, CodebookFormat, VectorFormat
from pallas_kernels.numerics import INSTRUCTION_ROWS
from pallas_kernels.packing import packed_bytes, plane_layout
from pallas_kernels.tiles.int8_triton import PAIR_DISTANCE, SUPPORTED_BITS

LEAST_KEY_TILE = 32
"""Least channels of a key tile: one 8-bit tensor-core instruction contracts as many."""

LEAST_VALUE_TILE = INSTRUCTION_ROWS
"""Least channels of a value tile."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Channels start to start + valid of a part's vector, padded to a power of two.

    Attributes:
        start: First channel, counted in the vector whose planes hold it.
        width: Channels of the tile, a power of two.
        valid: Channels of the tile that exist.
        partner: First channel of the tile that this one is mixed with; None for a tile of its own channels alone.
        half: For a mixed tile 0 or 1: which of the two tiles that hold the elements of both.
    """

    start: int
    width: int
    valid: int
    partner: int | None = None
    half: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """Channels that share a scale.

    Attributes:
        book: Codebook of the codes; for min-max groups its levels are unused.
        unsigned: Whether the codes are unsigned integers (min-max groups).
        sketch: Whether the bytes are the signs of the sketch instead of the packed codes.
        byte: First byte of the part's planes in the packed vector.
        channel: Channel of the whole vector that is the first of the part's planes.
        scale: Place in the axis of scales, None where there is no such axis.
        words: Whether every plane of every token starts and ends at a 4-byte word of memory, so that four neighbouring
            bytes lie in one register.
        tiles: Tiles of the channels.
    """

    book: Codebook
    unsigned: bool
    sketch: bool
    byte: int
    channel: int
    scale: int | None
    words: bool
    tiles: tuple[Tile, ...]


def cut(dim: int, bits: int, *, least: int, start: int = 0, stop: int | None = None) -> tuple[Tile, ...]:
    """Cuts channels start to stop of a packed vector into tiles of at least `least` channels.

    Args:
        dim: Channels of the vector.
        bits: Bits per code.
        least: Least width of a tile; a tile at the end may have fewer valid channels.
        start: First channel.
        stop: The channel behind the last; dim by default.

    Example:
        >>> [(tile.start, tile.width) for tile in cut(128, 4, least=32)]
        [(0, 64), (64, 64)]
        >>> cut(80, 4, least=32)[1].valid
        8
    """
    stop = dim if stop is None else stop
    run = plane_layout(bits, dim)[0][2]
    while run * 2 <= min(least, dim):
        run *= 2
    tiles, channel = [], start
    while channel < stop:
        left = min(stop, (channel // run + 1) * run) - channel
        width = max(least, 1 << (left.bit_length() - 1))
        tiles.append(Tile(channel, width, min(left, width)))
        channel += min(left, width)
    return tuple(tiles)


def codebook_parts(fmt: CodebookFormat, *, least: int, smallest: int) -> tuple[Part, ...]:
    """Parts of a codebook format: its segments, then the sketch if there is one.

    Args:
        fmt: The format.
        least: Least channels of a tile of a segment whose dim is a power of two and no less.
        smallest: Least channels of a tile of any other segment, unless `least` is less.

    Raises:
        NotImplementedError: For widths without a lookup.
    """
    parts, byte, channel = [], 0, 0
    for i, book in enumerate(fmt.segments):
        if book.bits not in SUPPORTED_BITS and book.bits:
            raise NotImplementedError(f"the kernel decodes codes of {SUPPORTED_BITS} bits, got bits={book.bits}")
        if book.bits:
            scale = i if fmt.num_scales > 1 else None
            whole = book.dim >= least and book.dim & (book.dim - 1) == 0
            tiles = cut(book.dim, book.bits, least=least if whole else min(least, smallest))
            edges = [n for _, start, size in plane_layout(book.bits, book.dim) for n in (byte + start, size)]
            words = not any(n % 4 for n in (fmt.packed_bytes, *edges))
            parts.append(Part(book, False, False, byte, channel, scale, words, tiles))
        byte, channel = byte + packed_bytes(book.dim, book.bits), channel + book.dim
    if fmt.residual:
        signs = Codebook(fmt.dim, 1, levels=(0,), step=2.0)
        parts.append(Part(signs, False, True, 0, 0, None, fmt.dim % 32 == 0, cut(fmt.dim, 1, least=least)))
    return tuple(parts)


def mixed_pairs(part: Part) -> Part:
    """The part with tiles mixed that share their lookups, wherever planes are whole words and tiles come in pairs."""
    distance = PAIR_DISTANCE.get(part.book.bits)
    field_bytes = plane_layout(part.book.bits, part.book.dim)[0][2]
    if distance is None or not part.words:
        return part
    found = {(tile.start, tile.width, tile.valid) for tile in part.tiles}
    tiles, taken = [], set()
    for tile in part.tiles:
        partner = tile.start + distance * field_bytes
        if tile.start in taken:
            continue
        # The fields must be the low and the high nibble of a lookup, in this order.
        low = tile.start // field_bytes % (2 * distance) < distance
        if not low or (partner, tile.width, tile.valid) not in found:
            tiles.append(tile)
            continue
        taken.add(partner)
        tiles += [dataclasses.replace(tile, partner=partner, half=half) for half in (0, 1)]
    return dataclasses.replace(part, tiles=tuple(tiles))


def key_parts(fmt: VectorFormat) -> tuple[Part, ...]:
    """Parts of the keys.

    Args:
        fmt: Format of the keys.

    Raises:
        NotImplementedError: For min-max keys and widths without a lookup.
    """
    if not isinstance(fmt, CodebookFormat):
        raise NotImplementedError(f"the kernel reads keys of codebook formats, got {type(fmt).__name__}")
    return tuple(mixed_pairs(part) for part in codebook_parts(fmt, least=LEAST_KEY_TILE, smallest=LEAST_KEY_TILE))


def value_parts(fmt: VectorFormat, *, num_warps: int = 1) -> tuple[Part, ...]:
    """Parts of the values.

    Args:
        fmt: Format of the values.
        num_warps: Warps of a program, which share the rows of a tile; each needs the rows of one instruction.

    Raises:
        NotImplementedError: For sketched values and widths without a lookup.
    """
    least = LEAST_VALUE_TILE * num_warps
    if isinstance(fmt, CodebookFormat):
        if fmt.residual:
            raise NotImplementedError("the kernel reads values without a sketch, got a residual")
        return codebook_parts(fmt, least=least, smallest=LEAST_VALUE_TILE)
    if fmt.bits not in (2, 4):
        raise NotImplementedError(f"the kernel reads min-max values of 2 and 4 bits, got bits={fmt.bits}")
    book = Codebook(fmt.dim, fmt.bits, levels=(), step=1.0)
    return tuple(
        Part(
            book,
            True,
            False,
            0,
            0,
            i,
            True,
            cut(fmt.dim, fmt.bits, least=LEAST_VALUE_TILE, start=c, stop=c + fmt.group),
        )
        for i, c in enumerate(range(0, fmt.dim, fmt.group))
    )


def planes_of(part: Part, tile: Tile) -> tuple[tuple[int, int, int, int], ...]:
    """Per plane of a part: width of a field, first byte, number of bytes, and the field where the tile starts."""
    planes = plane_layout(part.book.bits, part.book.dim)
    return tuple((width, part.byte + start, size, tile.start // size) for width, start, size in planes)
