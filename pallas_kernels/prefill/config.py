"""Tile sizes of the prefill kernel."""

import dataclasses

TILES = (32, 64, 128)
"""Tokens a tile may have."""

ROWS = (16, 32, 64, 128, 256)
"""Query rows a program may have."""


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """How the work is cut; static, and without influence on the result beyond rounding.

    Attributes:
        rows: Query rows (query tokens times query heads of a KV head) a program.
        tile: Tokens a step; a page holds a whole number of tiles.
        num_warps: Warps a program.
        num_stages: Steps whose loads are in flight.
        programs: Programs to aim at for the whole grid; sequences are split until there are as many.
    """

    rows: int = 128
    tile: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 132 * 2

    def __post_init__(self) -> None:
        for name, choice in (("tile", TILES), ("rows", ROWS), ("num_warps", (4, 8))):
            if getattr(self, name) not in choice:
                raise ValueError(f"expected {name} in {choice}, got {name}={getattr(self, name)}")


def default_config(page_size: int, *, query_rows: int, dim: int = 128) -> PrefillConfig:
    """The configuration for pages of a size.

    Args:
        page_size: Tokens a page.
        query_rows: Query tokens times query heads of a KV head.
        dim: Head dim of the values.
    """
    tile = 64 if page_size % 64 == 0 else 32
    if query_rows <= 64 or dim > 128:
        # Four programs fill a multiprocessor in two rounds better than three in one, as measured on an H100.
        rows = next(r for r in ROWS if r >= min(query_rows, 64))
        return PrefillConfig(rows=rows, tile=tile, programs=132 * 4)
    # Measured on an H100: the best with one sequence, with four within 2 % of tiles of 128 tokens and 8 warps.
    return PrefillConfig(rows=128, tile=tile)


def num_splits(config: PrefillConfig, *, blocks: int, capacity: int) -> int:
    """Programs a block of query rows: as many as fit the device at once, at most one a tile.

    Args:
        config: The configuration.
        blocks: Blocks of query rows of all sequences and KV heads.
        capacity: Tokens that the pages of a sequence can hold.
    """
    return max(1, min(-(-capacity // config.tile), config.programs // blocks))
