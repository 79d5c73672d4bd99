"""Tile sizes of the decode kernel."""

import dataclasses

from pallas_kernels.compat.device import H100_MULTIPROCESSORS

TILES = (32, 64, 128, 256)
"""Tokens a tile may have."""


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the work is cut; static, and without influence on the result beyond rounding.

    Attributes:
        tile: Tokens a step; a page holds a whole number of tiles.
        num_warps: Warps a program.
        num_stages: Steps whose loads are in flight.
        programs: Programs that the device runs at a time; sequences are split so that it is busy to the end.
        precise: Two-byte queries also where query rows have no room for pairs of columns (see `has_pairs`), which
            takes a second product: relative errors under 1e-4 instead of up to 1 %, where 4-bit codes cost over 10 %.
    """

    tile: int = 64
    num_warps: int = 1
    num_stages: int = 3
    programs: int = H100_MULTIPROCESSORS * 4
    precise: bool = False

    def __post_init__(self) -> None:
        if self.tile not in TILES:
            raise ValueError(f"expected tile in {TILES}, got tile={self.tile}")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"expected num_warps in (1, 2, 4, 8), got num_warps={self.num_warps}")


def column_block(columns: int, *, dim: int) -> int:
    """Columns of one program: two warps have registers for the accumulators of 2048 values."""
    return min(columns, 16, max(8, 2048 // (1 << (dim - 1).bit_length())))


def padded_columns(rows: int, *, dim: int) -> int:
    """Columns of a number of query rows: two a row (see `Plan.pairs`) where a program has room, padded."""
    columns = max(8, 1 << (rows - 1).bit_length())
    room = 2 * columns <= column_block(2 * columns, dim=dim)
    return 2 * columns if 2 * rows > columns and room else columns


def has_pairs(rows: int, *, dim: int) -> bool:
    """Whether queries have two bytes at no price: up to 8 query rows a KV head, or 4 above 128 channels.

    Example:
        >>> has_pairs(8, dim=128), has_pairs(8, dim=256)
        (True, False)
    """
    return 2 * rows <= column_block(padded_columns(rows, dim=dim), dim=dim)


def default_config(
    page_size: int,
    *,
    columns: int = 8,
    dim: int = 128,
    value_parts: int = 1,
    precise: bool = False,
    bits: tuple[int, int] = (4, 4),
    capability: int = 90,
    multiprocessors: int = H100_MULTIPROCESSORS,
) -> TileConfig:
    """The configuration for pages of a size.

    The tiles are those that `python benchmarks/tiles.py decode` found best on an H100 (docs/kernels.md), for other
    devices too; programs are what a device runs at a time, since a grid of a wave and a half takes as long as two.

    A tile has 64 tokens a warp, so that each thread copies two 2-byte scales, the least that is copied asynchronously.
    Four warps need 8 columns: with more, Triton takes the asynchronous products of Hopper, which it gets wrong here.
    What does not fit the registers so takes smaller tiles.

    Args:
        page_size: Tokens a page.
        columns: Query rows of a KV head, padded.
        dim: Head dim.
        value_parts: Value scales a token.
        precise: See `TileConfig`.
        bits: Bits of the widest codes of keys and of values.
        capability: Compute capability of the device, times ten.
        multiprocessors: Of the device.
    """
    # One byte of a query is no better than 8-bit keys.
    precise = precise or bits[0] == 8
    if columns == 8 and dim == 128 and value_parts == 1 and min(bits) >= 4 and page_size % 256 == 0:
        return TileConfig(tile=256, num_warps=4, num_stages=3, programs=multiprocessors * 2, precise=precise)
    # Two products of 3-bit codes for 16 columns: two registers too many; one too many on 10.0 at any width.
    wide = columns > 8 and ((capability == 100 and dim == 128) or (precise and min(bits) < 4))
    tile = 128 if dim in (64, 128) and value_parts == 1 and not wide else 64
    while tile > 32 and page_size % tile and tile % page_size:
        tile //= 2
    # On Blackwell, 3-bit keys have no registers for a third stage: 8 bytes spilled with triton 3.7.1.
    stages = 2 if capability >= 100 and columns == 8 and bits[0] == 3 and value_parts == 1 else 3
    return TileConfig(tile=tile, num_warps=2, num_stages=stages, programs=multiprocessors * 4, precise=precise)


SETUP_TILES = 2
"""Tiles that a program could read in the time that its start and end take."""


def num_splits(config: TileConfig, *, batch: int, kv_heads: int, capacity: int) -> int:
    """Programs a sequence and KV head: those that end first when `config.programs` run at a time."""
    tiles, rows = -(-capacity // config.tile), batch * kv_heads

    def time(splits: int) -> int:
        return -(-rows * splits // config.programs) * (-(-tiles // splits) + SETUP_TILES)

    most = min(tiles, 4 * -(-config.programs // rows))
    return min(range(1, most + 1), key=time)
