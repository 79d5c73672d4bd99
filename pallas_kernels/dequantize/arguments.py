"""The arguments of reading pages as dense tokens, in one pytree."""

import dataclasses
import math
from typing import Any

from jaxtyping import Array, Float, Float16, Int

from pallas_kernels.format import CodebookFormat, VectorFormat
from pallas_kernels.pytree import pytree


def matrix_gain(fmt: VectorFormat) -> float:
    """The factor in the matrix of a format, see `DequantizeArguments`; a Walsh-Hadamard matrix becomes signs, exactly.

    Example:
        >>> from pallas_kernels.format import GroupFormat
        >>> matrix_gain(GroupFormat(dim=64, bits=4, group=32))
        1.0
    """
    return math.sqrt(fmt.dim) if isinstance(fmt, CodebookFormat) else 1.0


@pytree
class DequantizeArguments:
    """Packed pages, and which of their tokens are wanted where; a pytree.

    Row i of a matrix is the vector in the original basis that coordinate i of a code stands for, times `matrix_gain`.
    Behind the rows of a Prod format's coordinates come those of the signs of its sketch.

    Attributes:
        pages: `Pages` of packed keys and values, or `pallas_kernels.blocks.Blocks` of them for the reference alone.
        key_matrix: Matrix of the keys.
        value_matrix: Matrix of the values.
        block_table: Page of each run of page_size tokens of each sequence.
        lengths: Tokens of each sequence; slots behind them may hold garbage, NaN included.
        starts: Place of the first token of each sequence among the tokens of the result.
        heads: KV heads that are wanted.
        key_format: Format of the keys (static).
        value_format: Format of the values (static).
        mean: Mean of the keys, which was subtracted; None for keys that are stored as they are.
        weight: Channel weights, by which keys were multiplied; None where there is no mean.
    """

    pages: Any
    key_matrix: Float16[Array, "k d"]
    value_matrix: Float16[Array, "v d"]
    block_table: Int[Array, "b n"]
    lengths: Int[Array, "b"]
    starts: Int[Array, "b"]
    heads: Int[Array, "h"]
    key_format: VectorFormat = dataclasses.field(metadata={"static": True})
    value_format: VectorFormat = dataclasses.field(metadata={"static": True})
    mean: Float[Array, "b h_kv d"] | None = None
    weight: Float[Array, "b h_kv d"] | None = None

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.pages.page_size
