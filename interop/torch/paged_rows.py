"""The sequences of a call over pages of a serving engine, and their tokens in full precision."""

import dataclasses
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class ExactRows:
    """Which tokens of sequences are read from a hot pool; int32 tensors like those of `PagedRows`.

    Attributes:
        slots: [b, n], slot of each block that is read there: of the first block of the sequence, if the pool has those,
            then of the blocks from token begin + packed on. Arbitrary, but a slot, where there is no block.
        begin: [b], first tokens that are read there: those of a block, or 0.
        packed: [b], tokens behind these that are read from codes; the rest is read from the hot pool.
    """

    slots: torch.Tensor
    begin: torch.Tensor
    packed: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.slots, self.begin, self.packed


@dataclasses.dataclass(frozen=True)
class PagedRows:
    """Sequences of one call; int32 tensors on the device of the pages, each at an address that kernels assume.

    Attributes:
        table: [b, n], page of each run of page_size tokens of each sequence, from its first token in pages on.
        lengths: [b], tokens of each sequence; 0 for padding, of which nothing is read.
        exact: The tokens that are not read from pages; None if all are.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    exact: ExactRows | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in the order of the fields."""
        return (self.table, self.lengths, *(() if self.exact is None else self.exact.tensors))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PagedRows":
        """The rows with every tensor replaced by that of a function."""
        table, lengths, *exact = map(function, self.tensors)
        return PagedRows(table, lengths, ExactRows(*exact) if exact else None)


@dataclasses.dataclass(frozen=True)
class HotPool:
    """Tokens in full precision, of blocks that have a slot.

    Attributes:
        keys: [tokens, h_kv, d], of the model's type; slot s has page_size tokens from s * page_size on. No slot has the
            last token: tokens without a place are written there.
        values: Values, laid out like the keys.
        first: Whether the first of `ExactRows.slots` is for the first block of a sequence.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first: bool
