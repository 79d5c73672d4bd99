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
        precise: Two-byte queries and probabilities: relative errors under 1e-4 on an H100 instead of up to 1.5 % (which
            long, nearly uniform attention over random values has; 4-bit codes themselves cost about 10 % there).
    """

    tile: int = 64
    num_warps: int = 1
    num_stages: int = 3
    programs: int = 132 * 10
    precise: bool = False

    def __post_init__(self) -> None:
        if self.tile not in TILES:
            raise ValueError(f"expected tile in {TILES}, got tile={self.tile}")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"expected num_warps in (1, 2, 4, 8), got num_warps={self.num_warps}")


def default_config(
    page_size: int, *, columns: int = 8, dim: int = 128, value_parts: int = 1, precise: bool = False
) -> TileConfig:
    """The configuration for pages of a size.

    One warp has registers for the accumulators of 8 columns of 128 channels; more of either, two-byte arithmetic and
    several value scales take more warps, and what 8 warps cannot hold takes smaller tiles.

    Args:
        page_size: Tokens a page.
        columns: Query rows of a KV head, padded.
        dim: Head dim.
        value_parts: Value scales a token.
        precise: See `TileConfig`.
    """
    if page_size % 128 == 0 and columns <= 8 and dim <= 128 and value_parts == 1 and not precise:
        # Measured on an H100: the best of 16 configurations at all widths but 4 bits, and within 5 % of it there.
        return TileConfig(tile=128, num_warps=2, num_stages=3, programs=132 * 6)
    load = columns * dim * (2 if precise else 1) * (2 if value_parts > 2 else 1)
    num_warps = min(8, max(1, 1 << ((load - 1) // 1024).bit_length()))
    largest = 64 if load < 8192 else 32
    tile = max((t for t in TILES if page_size % t == 0 and t <= largest), default=32)
    return TileConfig(tile=tile, num_warps=num_warps, programs=132 * max(1, 10 // num_warps), precise=precise)


def num_splits(config: TileConfig, *, batch: int, kv_heads: int, capacity: int) -> int:
    """Programs a sequence and KV head: as many as fill the device, at most one a tile."""
    tiles = -(-capacity // config.tile)
    return max(1, min(tiles, config.programs // (batch * kv_heads)))
