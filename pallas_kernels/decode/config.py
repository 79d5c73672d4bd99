"""Tile sizes of the decode kernel."""

import dataclasses

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
        precise: Two-byte queries and probabilities: relative errors under 1e-4 on an H100 instead of up to 1.5 % (which
            long, nearly uniform attention over random values has; 4-bit codes themselves cost about 10 % there).
    """

    tile: int = 64
    num_warps: int = 1
    num_stages: int = 3
    programs: int = 132 * 5
    precise: bool = False

    def __post_init__(self) -> None:
        if self.tile not in TILES:
            raise ValueError(f"expected tile in {TILES}, got tile={self.tile}")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"expected num_warps in (1, 2, 4, 8), got num_warps={self.num_warps}")


def column_block(columns: int, *, dim: int, precise: bool = False) -> int:
    """Columns of one program: two warps have registers for the accumulators of 4096 values, half when precise."""
    room = 4096 // (1 << (dim - 1).bit_length()) // (2 if precise else 1)
    return min(columns, 32, max(8, room))


def default_config(
    page_size: int,
    *,
    columns: int = 8,
    dim: int = 128,
    value_parts: int = 1,
    precise: bool = False,
    bits: tuple[int, int] = (4, 4),
) -> TileConfig:
    """The configuration for pages of a size.

    Programs have at most two warps where they have more than 8 columns: with four, Triton takes the asynchronous
    products of Hopper, whose int8 operands it gets wrong in some shapes.

    Args:
        page_size: Tokens a page.
        columns: Query rows of a KV head, padded.
        dim: Head dim.
        value_parts: Value scales a token.
        precise: See `TileConfig`.
        bits: Bits of the widest codes of keys and of values.
    """
    block = column_block(columns, dim=dim, precise=precise)
    if block == 8 and dim in (64, 128) and value_parts == 1 and not precise:
        if min(bits) >= 4 and page_size % 256 == 0:
            return TileConfig(tile=256, num_warps=4, num_stages=3, programs=132 * 2)
        if page_size % 128 == 0:
            return TileConfig(tile=128, num_warps=2, num_stages=3, programs=132 * 4)
    load = block * dim * (2 if precise else 1) * (2 if value_parts > 2 else 1)
    tile = 64 if load <= 2048 else 32
    while tile > 32 and page_size % tile and tile % page_size:
        tile //= 2
    return TileConfig(tile=tile, num_warps=2, programs=132 * 5, precise=precise)


SETUP_TILES = 2
"""Tiles that a program could read in the time that its start and end take."""


def num_splits(config: TileConfig, *, batch: int, kv_heads: int, capacity: int) -> int:
    """Programs a sequence and KV head: those that end first when `config.programs` run at a time."""
    tiles, rows = -(-capacity // config.tile), batch * kv_heads

    def time(splits: int) -> int:
        return -(-rows * splits // config.programs) * (-(-tiles // splits) + SETUP_TILES)

    most = min(tiles, 4 * -(-config.programs // rows))
    return min(range(1, most + 1), key=time)
