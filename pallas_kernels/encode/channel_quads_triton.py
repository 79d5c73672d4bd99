"""Quads of channels: the four tiles of channels j, j + n, j + 2n and j + 3n of a vector, encoded together.

The fields of a packed byte are then in one thread: packing is a shift and an or, and sums over channels begin with
three fused multiply-adds.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.encode.codes_by_comparison_ptx import LARGEST_TABLE, squares_ptx
from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.format import CodebookFormat
from pallas_kernels.packing import plane_widths
from pallas_kernels.tiles.intrinsics_triton import run
from pallas_kernels.tiles.ptx import EVERY_BYTE

ChannelQuad = Sequence[jax.Array]
"""Four float32 tiles [tile, n]; column j of tile i is channel start + j + i * dim / 4."""

LARGEST_HELD = 128
"""Channels of vectors that fit into registers with what a search, or a residual, needs beside them."""

LEAST_WIDTH = 16
"""Least channels of a tile."""

LEAST_THRESHOLD, LARGEST_THRESHOLD = 4.0, 127.0
"""Thresholds that are told from their float16 neighbours (see `codes_by_comparison_ptx`)."""


def tile_width(encoder: Encoder) -> int:
    """Channels of the tiles that make quads; 0 if quads do not hold the encoder's vectors."""
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


def quads(tiles: Sequence[jax.Array]) -> list[ChannelQuad]:
    """The quads of the tiles [tile, n] of consecutive runs of channels."""
    apart = len(tiles) // 4
    return [tiles[i::apart] for i in range(apart)]


def tiles(parts: Sequence[ChannelQuad]) -> list[jax.Array]:
    """The tiles [tile, n] of consecutive runs of channels that `quads` took."""
    return [part[i] for i in range(4) for part in parts]


def squares(parts: Sequence[ChannelQuad], *, interpret: bool) -> jax.Array:
    """Sum of squares of each vector, [tile]."""
    if interpret:
        return jnp.sum(sum(y * y for quad in parts for y in quad), axis=1)
    out = [run(squares_ptx(), quad)[0] for quad in parts]  # [tile, n] each
    return jnp.sum(sum(out[1:], out[0]), axis=1)


def scaled(parts: Sequence[ChannelQuad], factor: jax.Array) -> list[ChannelQuad]:
    """Vectors times their factors [tile]."""
    return [[y * factor[:, None] for y in quad] for quad in parts]


def in_rows(parts: Sequence[ChannelQuad], rows: int) -> list[ChannelQuad]:
    """Tiles [1, n] repeated in every row of tiles [rows, n]; tiles [rows, n] as they are."""
    return [[jnp.broadcast_to(y, (rows, y.shape[1])) for y in part] for part in parts]


def packed(codes: Sequence[jax.Array], bits: int) -> list[tuple[int, jax.Array]]:
    """Packs the codes of all quads of a tile of vectors.

    Args:
        codes: int32 [tile, n] per quad: the codes of its four channels, one per byte.
        bits: Bits per code.

    Returns:
        Runs of n consecutive bytes of a vector: the first byte of the run, and its bytes in the low bits of
        int32 [tile, n].
    """
    if not codes:
        return []
    out, first, shift, size = [], 0, 0, codes[0].shape[1]
    for width in plane_widths(bits):
        fields = [(code >> shift) & (((1 << width) - 1) * EVERY_BYTE) if width < bits else code for code in codes]
        if width == 1:
            half = len(fields) // 2
            fields = [fields[i] | (fields[i + half] << 1) for i in range(half)]
        for i, code in enumerate(fields):
            if width == 8:
                run_bytes = [code >> (8 * k) for k in range(4)]
            elif width == 4:
                both = code | (code >> 12)
                run_bytes = [both, both >> 8]
            else:
                pairs = code | (code >> 6)
                run_bytes = [pairs | (pairs >> 12)]
            out += [(first + (k * len(fields) + i) * size, byte) for k, byte in enumerate(run_bytes)]
        first, shift = first + len(fields) * len(run_bytes) * size, shift + width
    return out
