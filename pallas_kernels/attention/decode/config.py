"""Tile sizes of the decode kernel. Columns and query rows: see `decode.plan`."""

import dataclasses

from pallas_kernels.compat.device import BLACKWELL, H100_MULTIPROCESSORS, HOPPER
from pallas_kernels.numerics import INSTRUCTION_COLUMNS, power_of_two

TILES = (32, 64, 128, 256)
"""Tokens that a tile may have."""

MOST_COLUMNS = 16
"""Most columns of a program."""

ACCUMULATORS = 2048
"""Values (channels times columns) for whose accumulators two warps have registers."""

SETUP_TILES = 2
"""Tiles that a program could read in the time that its start and end take."""


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the work is cut; static, and without influence on the result beyond rounding.

    Attributes:
        tile: Tokens per step; a page holds a whole number of tiles.
        num_warps: Warps per program.
        num_stages: Steps whose loads are in flight.
        programs: Programs resident at once; sequences are split so that the last wave is full.
        precise: Two-byte queries even where query rows have no room for pairs of columns (see `has_pairs`). They take
            a second product: relative errors are under 1e-4 instead of up to 1 %, where 4-bit codes cost over 10 %.
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
    """Columns of one program: as many as leave two warps registers for their accumulators."""
    return min(columns, MOST_COLUMNS, max(INSTRUCTION_COLUMNS, ACCUMULATORS // power_of_two(dim)))


def padded_columns(rows: int, *, dim: int) -> int:
    """Columns, padding included, of a number of query rows: two per row where one program has room, else one."""
    columns = max(INSTRUCTION_COLUMNS, power_of_two(rows))
    room = 2 * columns <= column_block(2 * columns, dim=dim)
    return 2 * columns if 2 * rows > columns and room else columns


def has_pairs(rows: int, *, dim: int) -> bool:
    """Whether queries have two bytes without a second product: up to 8 query rows per KV head, 4 above 128 channels.

    Example:
        >>> has_pairs(8, dim=128), has_pairs(8, dim=256)
        (True, False)
    """
    return 2 * rows <= column_block(padded_columns(rows, dim=dim), dim=dim)


def default_config(
    page_size: int,
    *,
    columns: int = INSTRUCTION_COLUMNS,
    dim: int = 128,
    value_parts: int = 1,
    sketched: bool = False,
    precise: bool = False,
    bits: tuple[int, int] = (4, 4),
    capability: int = HOPPER,
    multiprocessors: int = H100_MULTIPROCESSORS,
) -> TileConfig:
    """The configuration for pages of a size.

    `python benchmarks/tiles.py decode` found these tiles best on an H100 (docs/kernels.md); other devices take them
    too. The number of programs is that which a device runs at once: a grid of a wave and a half takes as long as two.

    A tile has 64 tokens per warp, so that each thread copies two 2-byte scales, the least that has an asynchronous
    copy. Programs of four warps have 8 columns: with more, Triton takes Hopper's asynchronous products, which it
    compiles wrongly for this kernel. Where registers are short, tiles are smaller.

    Args:
        page_size: Tokens per page.
        columns: Columns per KV head, padding included.
        dim: Head dim.
        value_parts: Value scales per token; more than one for min-max values.
        sketched: Whether keys have the sketch of Prod.
        precise: See `TileConfig`.
        bits: Bits of the widest codes of keys and of values.
        capability: Compute capability of the device, times ten.
        multiprocessors: Multiprocessors of the device.
    """
    # A query of one byte would waste the precision of 8-bit keys.
    precise = precise or bits[0] == 8
    narrow = columns == INSTRUCTION_COLUMNS
    if narrow and dim == 128 and value_parts == 1 and min(bits) >= 4 and page_size % 256 == 0:
        return TileConfig(tile=256, num_warps=4, num_stages=3, programs=multiprocessors * 2, precise=precise)
    # With 16 columns, two products of 3-bit codes take two registers too many; on 10.0 any width takes one too many.
    # Places of tokens in several pages take registers, too.
    short = not narrow and ((capability == BLACKWELL and dim == 128) or (precise and min(bits) < 4) or page_size < 128)
    # Four scales per token of min-max values leave registers for 128 tokens on Hopper alone, where tiles of 64 take 1.8
    # times as long.
    few_scales = value_parts == 1 or (value_parts == 4 and capability == HOPPER)
    tile = 128 if dim in (64, 128) and few_scales and not short else 64
    while tile > 32 and page_size % tile and tile % page_size:
        tile //= 2
    # A third stage spilled with triton 3.7.1: 8 bytes of 3-bit keys on Blackwell, 8 to 16 of a sketch beside min-max
    # values, which takes the same time with two.
    crowded = bits[0] == 3 and value_parts == 1 and capability >= BLACKWELL and narrow
    stages = 2 if crowded or (sketched and value_parts > 1 and tile == 128) else 3
    return TileConfig(tile=tile, num_warps=2, num_stages=stages, programs=multiprocessors * 4, precise=precise)


def num_splits(config: TileConfig, *, batch: int, kv_heads: int, capacity: int) -> int:
    """Programs per sequence and KV head: the number that finishes first when `config.programs` run at once.

    Args:
        config: The configuration.
        batch: Sequences.
        kv_heads: KV heads.
        capacity: Tokens that the pages of a sequence can hold.
    """
    tiles, rows = -(-capacity // config.tile), batch * kv_heads

    def time(splits: int) -> int:
        return -(-rows * splits // config.programs) * (-(-tiles // splits) + SETUP_TILES)

    most = min(tiles, 4 * -(-config.programs // rows))
    return min(range(1, most + 1), key=time)
