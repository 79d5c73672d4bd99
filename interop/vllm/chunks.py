"""The prompts of a step as calls of dense attention, planned once for all layers.

The chunks of prompts without earlier tokens attend to themselves as they are. Prompts that go on attend to dense keys
and values: earlier tokens, read back from the codes and from the hot pools, and those of their chunk, in order.
All prompts of either kind that follow each other are one call. Nothing here is read back from the device.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

from interop.torch.paged_rows import PagedRows
from interop.vllm.window import WindowSpec
from pallas_kernels.numerics import power_of_two


@dataclasses.dataclass(frozen=True)
class HotCopies:
    """Earlier tokens that are copied from the hot pools over what codes say.

    Attributes:
        places: int64 [n], place of each in the dense tokens; for entries without a token that of a token of a chunk.
        sources: int64 [n], place of each in the hot pools.
    """

    places: torch.Tensor
    sources: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The dense tokens of prompts that go on.

    Attributes:
        rows: The earlier tokens of each prompt, in pages; padded to a power of two, so that few functions are compiled.
        starts: int32, place of the first token of each of these rows in the dense tokens.
        ends: int32 [prompts + 1], zero and the place behind the last token of each prompt.
        own: int64, place of each token of the chunks.
        hot: Tokens that the hot pools have; None without a window.
        longest: Most tokens of a prompt.
        count: Most tokens of all prompts.
    """

    rows: PagedRows
    starts: torch.Tensor
    ends: torch.Tensor
    own: torch.Tensor
    hot: HotCopies | None
    longest: int
    count: int


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Successive prompts of a step that attend in one call.

    Attributes:
        first: Index of the first token among the tokens of the step.
        starts: Index of the first token of each prompt behind it, and the end of the last one.
        starts_on_device: The same, int32.
        earlier: The prompts' dense tokens; None if they have no earlier tokens.
    """

    first: int
    starts: list[int]
    starts_on_device: torch.Tensor
    earlier: Earlier | None

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk."""
        return max(end - start for start, end in itertools.pairwise(self.starts))


def group_prompts(earlier: Sequence[int], *, most: int) -> Iterator[range]:
    """Successive prompts for one call each: of one kind, and of at most so many tokens if they go on.

    Args:
        earlier: All tokens of each prompt that goes on; 0 for the others.
        most: Most dense tokens of a call; a prompt with more has a call of its own.

    Example:
        >>> list(group_prompts([0, 0, 30, 40, 50, 0], most=80))
        [range(0, 2), range(2, 4), range(4, 5), range(5, 6)]
    """
    first = total = 0
    for index, count in enumerate(earlier):
        if index > first and ((count > 0) != (earlier[first] > 0) or (count and total + count > most)):
            yield range(first, index)
            first, total = index, 0
        total += count
    if earlier:
        yield range(first, len(earlier))


def plan_earlier(
    rows: PagedRows,
    table: torch.Tensor,
    starts: torch.Tensor,
    totals: Sequence[int],
    *,
    tokens: int,
    window: WindowSpec | None,
) -> Earlier:
    """Plans the dense tokens of prompts that go on.

    Args:
        rows: Their earlier tokens, with those in full precision if there is a window, and perhaps padding.
        table: int32 [prompts, n], all their blocks.
        starts: int32 [prompts + 1] on the device, first token of each chunk among those of the chunks, and the end.
        totals: Most tokens of each prompt.
        tokens: Tokens of the chunks.
        window: What is read in full precision; None for nothing.
    """
    rows = rows.map(lambda x: x[: len(totals)])
    count = starts[1:] - starts[:-1]
    ends = torch.nn.functional.pad(torch.cumsum(rows.lengths + count, 0, dtype=torch.int32), (1, 0))
    begin = ends[:-1]
    # Token i of a chunk lies as far before the end of its prompt as before the end of its chunk.
    shift = (ends[1:] - starts[1:]).long()
    own = torch.repeat_interleave(shift, count, output_size=tokens) + torch.arange(tokens, device=shift.device)
    hot = None if window is None else _hot_copies(rows, begin, window, unused=own[0])
    padding = power_of_two(len(totals)) - len(totals)
    codes = PagedRows(table, rows.lengths).map(lambda x: _padded(x, padding))
    return Earlier(codes, _padded(begin, padding), ends, own, hot, max(totals), sum(totals))


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of the tensor, at an address that kernels assume, with so many more rows of zeros."""
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, rows)) if rows else x.clone()


def _hot_copies(rows: PagedRows, begin: torch.Tensor, spec: WindowSpec, *, unused: torch.Tensor) -> HotCopies:
    """Which dense tokens of sequences, the first of each at `begin`, are copied from the hot pools."""
    exact, block, device = rows.exact, spec.block, begin.device
    assert exact is not None
    place = torch.arange(block, device=device)
    tail = torch.arange(exact.slots.shape[1] - spec.first, device=device)
    start = (exact.begin + exact.packed).long()[:, None, None]  # first token of the run of blocks at the end
    token = start + tail[:, None] * block + place  # [b, tail, block]
    known = token < rows.lengths[:, None, None]
    if spec.first:
        whole = place.expand(len(rows.lengths), 1, block)
        token, known = torch.cat([whole, token], 1), torch.cat([whole < exact.begin[:, None, None], known], 1)
    places = torch.where(known, begin[:, None, None] + token, unused)
    return HotCopies(places.flatten(), (exact.slots.long()[..., None] * block + place).flatten())
