"""Static configuration of a launch of the decode kernel, and its arrays.

Words of the kernel:

    query row   a query token and a query head of the program's KV head, numbered token * group + head
    column      a column of every product: a query row or, in pairs, the high or the low byte of one; columns behind
                the last query row are padding
    pair        columns 2 i and 2 i + 1: the high and the low byte of query row i, and of its probabilities
    precise     queries of two bytes where columns have no room for pairs: the low byte takes a second product
    part        channels that share a scale per token (`tiles.layout.Part`); keys and values are one part or several
    tile        the tokens of one step; also the channels of one product (`tiles.layout.Tile`)
    split       one of the programs that share the tokens of a sequence
    reference   the base-2 exponent that sums of a column are relative to, so that they neither overflow nor vanish
"""

import dataclasses
from typing import Any

from pallas_kernels.attention.exact import ExactInputs, ExactPlan
from pallas_kernels.attention.page_plan import PagePlan
from pallas_kernels.numerics import BYTE_BITS, INSTRUCTION_ROWS
from pallas_kernels.pytree import pytree

LARGEST_ONE_BYTE, LARGEST_TWO_BYTES = 127.0, 127.0 * (1 << BYTE_BITS)
"""Largest integers of numbers that are quantized to one byte and to two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan(PagePlan):
    """Static configuration of the decode kernel, whose splits are per sequence and KV head.

    Attributes:
        columns: Columns per program.
        blocks: Programs that share the columns of a KV head, count * group query rows padded.
        num_warps: Warps per program.
        precise: Whether queries have two bytes even if that takes two products.
        exact: How some programs attend over tokens in full precision; None if none do.
    """

    columns: int
    blocks: int
    num_warps: int
    precise: bool
    exact: ExactPlan | None = None

    @property
    def pairs(self) -> bool:
        """Whether columns come in pairs: the high and the low byte of a query row and of its probabilities."""
        return self.blocks == 1 and 2 * self.count * self.group <= self.columns

    @property
    def largest_query(self) -> float:
        """Largest integer of a quantized query."""
        return LARGEST_TWO_BYTES if self.pairs or self.precise else LARGEST_ONE_BYTE

    @property
    def folded_rows(self) -> int:
        """Rows that remain of a tile once every thread has added up the rows that it holds."""
        return min(self.tile, INSTRUCTION_ROWS * self.num_warps)


@pytree
class DecodeInputs:
    """Arrays of the kernel, or its references.

    Attributes:
        query: float32 [b, t, h_q, d], rotated.
        pages: `Pages` of arrays as `tiles.pool_ref.addressed` makes them.
        table: int32 [b, n], page of each run of page_size tokens.
        lengths: int32 [b], tokens in the pages.
        positions: int32 [b, t], positions of the queries, counted like the tokens of the pages.
        bias: float32 [b, t, h_q], added to the logits of a query; None for zero.
        sketch: float32 [b, t, h_q, d], S y of the queries; None unless keys are Prod.
        shifts: int8, see `shift_table`; None where no tile needs shifts.
        exact: Queries as the model has them, and tokens in full precision; None if there are no programs for these.
    """

    query: Any
    pages: Any
    table: Any
    lengths: Any
    positions: Any
    bias: Any
    sketch: Any
    shifts: Any = None
    exact: ExactInputs | None = None
