"""Tile sizes of the encode kernel."""

import dataclasses

from pallas_kernels.encode import codes_by_comparison_triton as by_comparison
from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.format import CodebookFormat


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the work is cut; static, and without influence on the result.

    Attributes:
        tile: Tokens a program.
        num_warps: Warps a program.
        chunk: Channels of a rotation that one matrix product contracts.
    """

    tile: int = 32
    num_warps: int = 2
    chunk: int = 32

    def __post_init__(self) -> None:
        for name, allowed in (("tile", (16, 32, 64, 128)), ("num_warps", (1, 2, 4, 8)), ("chunk", (16, 32, 64, 128))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected {name} in {allowed}, got {name}={getattr(self, name)}")


def default_config(tokens: int, encoder: Encoder) -> TileConfig:
    """The configuration for a number of tokens of one row (or of all, where rows are shorter than a tile).

    Where the rotation is one of sums and differences a warp takes 16 tokens, and two warps fill a sector with a byte of
    every token. Other rotations hold planes of whole rows: the fewer tokens a warp, the fewer registers.
    """
    fmt = encoder.format
    tile = 16 if tokens <= 16 else 32
    if encoder.hadamard and by_comparison.tile_width(encoder):
        return TileConfig(tile=16, num_warps=2) if fmt.dim > 128 else TileConfig(tile=tile, num_warps=tile // 16)
    fractional = isinstance(fmt, CodebookFormat) and len(fmt.segments) > 1
    if fractional:
        return TileConfig(tile=16, num_warps=8, chunk=128)
    residual = isinstance(fmt, CodebookFormat) and fmt.residual
    return TileConfig(tile=16 if fmt.dim > 128 or residual else tile, num_warps=8)
