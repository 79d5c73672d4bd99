"""Tile sizes of the encode kernel."""

import dataclasses

from pallas_kernels.encode import channel_quads_triton as channel_quads
from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.format import CodebookFormat


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """How the encode kernel cuts its work; static, without influence on the result.

    Attributes:
        tile: Tokens per program.
        num_warps: Warps per program.
        chunk: Channels of a rotation that one matrix product contracts.
    """

    tile: int = 32
    num_warps: int = 2
    chunk: int = 32

    def __post_init__(self) -> None:
        for name, allowed in (("tile", (16, 32, 64, 128)), ("num_warps", (1, 2, 4, 8)), ("chunk", (16, 32, 64, 128))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected {name} in {allowed}, got {name}={getattr(self, name)}")


TileConfig = EncodeConfig
"""The public name of EncodeConfig."""


def default_config(tokens: int, encoder: Encoder) -> EncodeConfig:
    """The configuration for a number of tokens.

    If the rotation is sums and differences, a warp takes 16 tokens, and two warps fill a memory sector with one byte
    per token. Other rotations hold planes of whole vectors: the fewer tokens per warp, the fewer registers.

    Args:
        tokens: Tokens of one row; of all rows together if rows are shorter than a tile.
        encoder: How they are encoded.
    """
    fmt = encoder.format
    tile = 16 if tokens <= 16 else 32
    if encoder.hadamard and channel_quads.tile_width(encoder):
        return EncodeConfig(tile=16, num_warps=2) if fmt.dim > 128 else EncodeConfig(tile=tile, num_warps=tile // 16)
    fractional = isinstance(fmt, CodebookFormat) and len(fmt.segments) > 1
    if fractional:
        return EncodeConfig(tile=16, num_warps=8, chunk=128)
    residual = isinstance(fmt, CodebookFormat) and fmt.residual
    return EncodeConfig(tile=16 if fmt.dim > 128 or residual else tile, num_warps=8)
