"""Static configuration of the encode kernel, and its arrays."""

import dataclasses
from typing import Any

from pallas_kernels.format import ScaleRule, VectorFormat
from pallas_kernels.pytree import pytree
from pallas_kernels.tiles.pool_ref import PoolShape


@dataclasses.dataclass(frozen=True)
class EncodePlan:
    """Static configuration of an encode kernel.

    Attributes:
        fmt: Format of the pool.
        scale: Scale rule.
        search: Whether the step of each vector is searched.
        factor: The rotation matrix over the sum of its planes.
        channel_major: Whether bytes come before tokens in a page, as those of values do.
        page_size: Tokens per page.
        pools: Where the pages of each array with elements lie.
        rows: Rows of the batch.
        tokens: Tokens per row.
        tile: Tokens per program.
        chunk: Channels that one product of the rotation contracts.
        flat: Whether a tile may hold tokens of several rows.
        planes: fp16 planes that vectors are cut into; 0 if bfloat16 vectors are multiplied as they are.
        hadamard: Whether the matrix is signs of channels times the Walsh-Hadamard matrix.
        width: Channels of the tiles of channel quads; 0 if quads do not hold the vectors.
        interpret: Whether the kernel runs as jnp.
    """

    fmt: VectorFormat
    scale: ScaleRule
    search: bool
    factor: float
    channel_major: bool
    page_size: int
    pools: tuple[PoolShape, ...]
    rows: int
    tokens: int
    tile: int
    chunk: int
    flat: bool
    planes: int
    hadamard: bool
    width: int
    interpret: bool


@pytree
class EncodeInputs:
    """Arrays of the kernel outside it, references to them inside; "padded" sizes are powers of two.

    Attributes:
        x: [rows, tokens, heads, dim].
        slots: int32 [rows, tokens], page slots.
        mean: float32 [statistics rows, heads, dim], or None.
        weight: Shaped like the mean; None without one.
        rows: int32 [rows], the statistics row of each row; None for all in order.
        matrices: For each segment, planes [padded dim, padded channels] of its rotation; empty without a rotation.
        packers: For each segment, fp16 [padded channels, padded bytes] per plane of its codes.
        sketch: fp16 planes [padded dim, 8 * padded bytes] of the transposed sketch; columns in the order of the bits of
            their signs, bit 0 of every byte first; empty without a sketch.
        inverse: float32 [64], 1 / the multiples of a search; None without a search.
        places: int32 [rows, tokens, 2], places of tokens in the pool of exact tokens, as the halves of an int64; None
            without such a pool.
    """

    x: Any
    slots: Any
    mean: Any
    weight: Any
    rows: Any
    matrices: tuple
    packers: tuple
    sketch: tuple
    inverse: Any
    places: Any = None
