"""What is static about a launch of the decode kernel, and its arrays."""

import dataclasses
from typing import Any

import jax

from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.tiles.layout import Part

ONE_BYTE, TWO_BYTES = 127.0, 127.0 * 256
"""Largest integers of quantized numbers."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a kernel.

    Attributes:
        keys: Parts of the keys.
        values: Parts of the values.
        options: Logit options.
        count: Query tokens.
        group: Query heads a KV head.
        columns: Columns of a program.
        blocks: Programs that share the columns, count * group padded.
        tile: Tokens a step.
        page_size: Tokens a page.
        splits: Programs a sequence and KV head.
        num_warps: Warps a program.
        precise: Whether queries have two bytes even if that takes two products.
        interpret: Whether the kernel runs as jnp.
    """

    keys: tuple[Part, ...]
    values: tuple[Part, ...]
    options: LogitOptions
    count: int
    group: int
    columns: int
    blocks: int
    tile: int
    page_size: int
    splits: int
    num_warps: int
    precise: bool
    interpret: bool

    @property
    def pairs(self) -> bool:
        """Whether columns come in pairs, the high and the low byte of a query and of its probabilities."""
        return self.blocks == 1 and 2 * self.count * self.group <= self.columns

    @property
    def query_top(self) -> float:
        """Largest integer of a quantized query."""
        return TWO_BYTES if self.pairs or self.precise else ONE_BYTE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of the kernel, or its references; see `decode_attention`, and for shifts `shift_table`."""

    query: Any
    pages: Any
    table: Any
    lengths: Any
    positions: Any
    bias: Any
    sketch: Any
    shifts: Any = None
