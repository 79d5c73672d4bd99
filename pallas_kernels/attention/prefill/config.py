"""Tile sizes of the prefill kernel."""

import dataclasses

from pallas_kernels.compat.device import BLACKWELL, H100_MULTIPROCESSORS, HOPPER

TILES = (32, 64, 128)
"""Tokens that a tile may have."""

ROWS = (16, 32, 64, 128, 256)
"""Query rows that a program may have."""


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """How the work is cut; static, and without influence on the result beyond rounding.

    Attributes:
        rows: Query rows (query tokens times query heads per KV head) per program.
        tile: Tokens per step; a page holds a whole number of tiles, or a tile a whole number of pages.
        num_warps: Warps per program.
        num_stages: Steps whose loads are in flight.
        programs: Programs to aim at for the whole grid; sequences are split until there are as many.
    """

    rows: int = 256
    tile: int = 64
    num_warps: int = 8
    num_stages: int = 2
    programs: int = H100_MULTIPROCESSORS

    def __post_init__(self) -> None:
        for name, choice in (("tile", TILES), ("rows", ROWS), ("num_warps", (4, 8))):
            if getattr(self, name) not in choice:
                raise ValueError(f"expected {name} in {choice}, got {name}={getattr(self, name)}")


def default_config(
    page_size: int,
    *,
    query_rows: int,
    dim: int = 128,
    lean: bool = True,
    heavy: bool = False,
    mixed: bool = False,
    capability: int = HOPPER,
    multiprocessors: int = H100_MULTIPROCESSORS,
) -> PrefillConfig:
    """The configuration for pages of a size: the largest tiles that spill no registers.

    The configuration has two stages, because Triton does not compile the kernel with three for compute capability
    10.0; three where 32 query rows of several segments spill with two.

    Args:
        page_size: Tokens per page.
        query_rows: Query tokens times query heads per KV head.
        dim: Head dim of keys or values, the larger one.
        lean: Whether keys and values have 4 bits and one scale per token; other formats take more registers.
        heavy: Whether vectors have several segments of different bits, or codes that take as many registers.
        mixed: Whether vectors have several segments of different bits.
        capability: Compute capability of the device, times ten.
        multiprocessors: Multiprocessors of the device.
    """
    tile = 64 if lean and dim in (64, 128) and page_size % 64 == 0 else 32
    if dim <= 128 and query_rows > 64 and capability == HOPPER and not heavy:
        return PrefillConfig(rows=256, tile=tile, num_warps=8, programs=multiprocessors)
    if dim <= 128 and query_rows > 64 and capability == BLACKWELL and lean:
        return PrefillConfig(rows=128, tile=tile, num_warps=4, programs=multiprocessors * 2)
    # Elsewhere registers hold queries and sums; 64 rows of 128 channels leave enough of them.
    most = 64 if dim <= 128 and (capability in (HOPPER, BLACKWELL) or not heavy) else 32
    rows = next(r for r in ROWS if r >= min(query_rows, most))
    stages = 3 if mixed and dim <= 128 and most == 32 else 2
    return PrefillConfig(rows=rows, tile=tile, num_warps=4, num_stages=stages, programs=multiprocessors * 4)


def num_splits(config: PrefillConfig, *, blocks: int, capacity: int) -> int:
    """Programs per block of query rows: as many as fit the device at once, at most one per tile.

    Args:
        config: The configuration.
        blocks: Blocks of query rows of all sequences and KV heads.
        capacity: Tokens that the pages of a sequence can hold.
    """
    return max(1, min(-(-capacity // config.tile), config.programs // blocks))
