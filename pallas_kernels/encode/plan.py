"""What is static about an encode kernel, and its arrays."""

import dataclasses
from typing import Any

import jax

from pallas_kernels.format import ScaleRule, VectorFormat


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a kernel.

    Attributes:
        fmt: What is written.
        scale: Scale rule.
        search: Whether steps are searched.
        factor: The rotation's matrix over the sum of its planes.
        channel_major: Whether bytes come before tokens in a page (values).
        page_size: Tokens a page.
        rows: Rows of the batch.
        tokens: Tokens a row.
        tile: Tokens a program.
        chunk: Channels that one product of the rotation contracts.
        flat: Whether a tile may hold tokens of several rows.
        planes: fp16 planes that vectors are cut into; 0 for bfloat16 vectors that are multiplied as they are.
        hadamard: Whether the matrix is signs of channels times the Walsh-Hadamard matrix.
        width: Channels of the tiles of quads; 0 where quads do not hold the vectors.
        interpret: Whether the kernel runs as jnp.
    """

    fmt: VectorFormat
    scale: ScaleRule
    search: bool
    factor: float
    channel_major: bool
    page_size: int
    rows: int
    tokens: int
    tile: int
    chunk: int
    flat: bool
    planes: int
    hadamard: bool
    width: int
    interpret: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of the kernel, or its references.

    Attributes:
        x: [rows, tokens, heads, dim].
        slots: int32 [rows, tokens].
        mean: [any rows, heads, dim] or None.
        weight: Likewise.
        rows: int32 [rows], those of mean and weight; None for all in order.
        matrices: Planes [padded dim, padded channels] of each segment's rotation; empty without one.
        packers: fp16 [padded channels, padded bytes] of each plane of each segment.
        sketch: fp16 planes [padded dim, 8 * padded bytes] of the transposed sketch, columns in the order of the bits of
            their signs: bit 0 of every byte first; empty without one.
        inverse: 1 / the multiples of a search, or None.
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
