"""The arguments of attention over packed pages, in one pytree."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial
from pallas_kernels.format import VectorFormat
from pallas_kernels.pytree import pytree


@pytree
class PagedArguments:
    """Queries in the rotated basis, and the packed pages that they attend to; a pytree.

    Attributes:
        query: Rotated queries, float32; h_q is a multiple of the pages' KV heads.
        pages: `Pages` of packed keys and values, or `pallas_kernels.blocks.Blocks` of them for the reference alone.
        block_table: Page of each run of page_size tokens of each sequence.
        lengths: Tokens of each sequence in the pages; slots behind them may hold garbage, NaN included.
        positions: Position of each query, counted like the tokens of the pages.
        key_format: Format of the keys (static).
        value_format: Format of the values (static).
        options: Logit scale, soft-cap and sliding window (static).
        logit_bias: Added to every logit of a query after scaling and before the soft-cap (the query times the mean of
            the keys); None for zero.
        sketch_query: S y of the rotated queries, multiplied by the sketch's gain; given exactly for Prod keys.
    """

    query: Float[Array, "b t h_q d"]
    pages: Any
    block_table: Int[Array, "b n"]
    lengths: Int[Array, "b"]
    positions: Int[Array, "b t"]
    key_format: VectorFormat = dataclasses.field(metadata={"static": True})
    value_format: VectorFormat = dataclasses.field(metadata={"static": True})
    options: LogitOptions = dataclasses.field(metadata={"static": True})
    logit_bias: Float[Array, "b t h_q"] | None = None
    sketch_query: Float[Array, "b t h_q d"] | None = None

    @property
    def kv_heads(self) -> int:
        """KV heads of the pages."""
        return self.pages.kv_heads

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.pages.page_size

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[2] // self.kv_heads

    def require_consistent(self) -> None:
        """Raises ValueError if head counts or dims do not fit, or if the sketch is missing or superfluous."""
        if self.query.shape[-1] != self.key_format.dim or self.query.shape[2] % self.kv_heads:
            raise ValueError(
                f"expected queries with a multiple of {self.kv_heads} heads and dim {self.key_format.dim}, "
                f"got {self.query.shape}"
            )
        given = self.sketch_query is not None
        if given != getattr(self.key_format, "residual", False):
            raise ValueError(f"expected sketch_query exactly for Prod keys, got sketch_query={given}")


def from_fields(operation: Callable[..., Partial]) -> Callable[..., Partial]:
    """An operation on `PagedArguments` as a function of their fields.

    Args:
        operation: `decode_attention` or `prefill_attention`.
    """

    def run(*arrays: Any, implementation: str = "auto", config: Any = None, **fields: Any) -> Partial:
        return operation(PagedArguments(*arrays, **fields), implementation=implementation, config=config)

    return run
