"""Tile sizes of the encode kernel."""

import dataclasses

from pallas_kernels.encode import channel_quads_triton as channel_quads
from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.format import CodebookFormat


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """How the encode kernel cuts its work; static, without influence on the result.

    Attributes:
        tile: Tokens per program. Programs of one token take encoders for which `takes_one_token` holds.
        num_warps: Warps per program.
        chunk: Channels of a rotation that one matrix product contracts.
    """

    tile: int = 32
    num_warps: int = 2
    chunk: int = 32

    def __post_init__(self) -> None:
        sizes = (16, 32, 64, 128)
        for name, allowed in (("tile", (1, *sizes)), ("num_warps", (1, 2, 4, 8)), ("chunk", sizes)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected {name} in {allowed}, got {name}={getattr(self, name)}")


TileConfig = EncodeConfig
"""The public name of EncodeConfig."""


FEW_TOKENS = 256
"""Most tokens that have a program each: for more, programs of several tokens take less time."""


def takes_one_token(encoder: Encoder) -> bool:
    """Whether a program of one token can encode: channel quads hold its vector, and no sketch multiplies it."""
    residual = isinstance(encoder.format, CodebookFormat) and encoder.format.residual
    return encoder.hadamard and channel_quads.tile_width(encoder) > 0 and not residual


def default_config(tokens: int, encoder: Encoder, *, single: bool = False) -> EncodeConfig:
    """The configuration for a number of tokens.

    Few tokens are bound by the latency of a program, which is least for one token.

    If the rotation is sums and differences, a warp takes 16 tokens, and two warps fill a memory sector with one byte
    per token. Other rotations hold planes of whole vectors: the fewer tokens per warp, the fewer registers.

    Args:
        tokens: Tokens of one row; of all rows together if rows are shorter than a tile.
        encoder: How they are encoded.
        single: Whether few tokens may have a program each.
    """
    if single and tokens <= FEW_TOKENS:
        return EncodeConfig(tile=1, num_warps=1)
    fmt = encoder.format
    tile = 16 if tokens <= 16 else 32
    if encoder.hadamard and channel_quads.tile_width(encoder):
        return EncodeConfig(tile=16, num_warps=2) if fmt.dim > 128 else EncodeConfig(tile=tile, num_warps=tile // 16)
    fractional = isinstance(fmt, CodebookFormat) and len(fmt.segments) > 1
    if fractional:
        return EncodeConfig(tile=16, num_warps=8, chunk=128)
    residual = isinstance(fmt, CodebookFormat) and fmt.residual
    return EncodeConfig(tile=16 if fmt.dim > 128 or residual else tile, num_warps=8)
