"""Tile sizes of the encode kernel."""

import dataclasses


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


def default_config(tokens: int, dim: int) -> TileConfig:
    """The configuration for a number of tokens of one row (or of all, where rows are shorter than a tile).

    A thread holds half a row of 128 channels of two tokens, which its registers are good for.
    """
    largest = 128 if dim <= 128 else 64
    tile = min(largest, max(16, 1 << (tokens - 1).bit_length()))
    num_warps = max(4, tile // 16) if dim <= 128 else 8
    return TileConfig(tile=tile, num_warps=num_warps, chunk=128 if dim <= 128 else 64)
