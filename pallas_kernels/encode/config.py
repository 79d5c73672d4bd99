"""Tile sizes of the encode kernel."""

import dataclasses

from pallas_kernels.encode import quads
from pallas_kernels.format import CodebookFormat, VectorFormat


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the work is cut; static, and without influence on the result.

    Attributes:
        tile: Tokens a program.
        num_warps: Warps a program.
        chunk: Channels of a rotation that one matrix product contracts.
    """

    tile: int = 128
    num_warps: int = 8
    chunk: int = 128

    def __post_init__(self) -> None:
        for name, allowed in (("tile", (16, 32, 64, 128)), ("num_warps", (1, 2, 4, 8)), ("chunk", (16, 32, 64, 128))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected {name} in {allowed}, got {name}={getattr(self, name)}")


def default_config(tokens: int, fmt: VectorFormat, *, hadamard: bool = False) -> TileConfig:
    """The configuration for a number of tokens of one row (or of all, where rows are shorter than a tile).

    A thread holds half a row of 128 channels of one segment of two tokens. Formats whose channels are no quads, and
    rotations of more than 128 channels, need more registers a channel.
    """
    width = quads.tile_width(fmt, hadamard=hadamard)
    if width and hadamard:
        return TileConfig(tile=16, num_warps=1)
    segments = list(fmt.segments) if isinstance(fmt, CodebookFormat) and not fmt.residual else []
    lean = width > 0 and fmt.dim <= 128
    if fmt.dim > 192:
        return TileConfig(tile=16, num_warps=8, chunk=64)
    largest = 32 if not lean else 64 if segments[0].bits == 5 else 128
    tile = min(largest, max(16, 1 << (tokens - 1).bit_length()))
    return TileConfig(tile=tile, num_warps=8 if tile == largest else 4, chunk=128 if lean else 32)
