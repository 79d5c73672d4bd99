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
        programs: Programs to aim at for the whole grid; sequences are split until there are as many.
        precise: Two-byte queries and probabilities: errors of 1e-4 instead of a tenth of the quantization error.
    """

    tile: int = 64
    num_warps: int = 1
    num_stages: int = 3
    programs: int = 132 * 12
    precise: bool = False

    def __post_init__(self) -> None:
        if self.tile not in TILES:
            raise ValueError(f"expected tile in {TILES}, got tile={self.tile}")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"expected num_warps in (1, 2, 4, 8), got num_warps={self.num_warps}")


def default_config(page_size: int, *, columns: int = 8, dim: int = 128, precise: bool = False) -> TileConfig:
    """The configuration for pages of a size, query rows padded to `columns`, and head dim.

    One warp holds the accumulators of 8 columns of 128 channels; more of either take more warps.
    """
    load = columns * dim * (2 if precise else 1)
    num_warps = min(8, max(1, 1 << ((load - 1) // 1024).bit_length()))
    tile = max((t for t in TILES if page_size % t == 0 and t <= 64), default=32)
    return TileConfig(tile=tile, num_warps=num_warps, programs=132 * max(1, 12 // num_warps), precise=precise)


def num_splits(config: TileConfig, *, batch: int, kv_heads: int, capacity: int) -> int:
    """Programs a sequence and KV head: as many as fill the device, at most one a tile."""
    tiles = -(-capacity // config.tile)
    return max(1, min(tiles, config.programs // (batch * kv_heads)))
