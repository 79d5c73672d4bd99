"""How the queries of one step become calls of few shapes: decodes together, chunks of prompts in pieces."""

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from interop.torch.paged import PagedRows
from pallas_kernels.attention.decode.launch_triton import MAX_QUERY_TOKENS

SIZES = {
    "cpu": (1, 8, 64, 256),
    "cuda": (1, 2, 4, MAX_QUERY_TOKENS, 16, 32, 64, 128, 256, 384, 512, 768, 1024),
}
"""Queries that the sequences of a call have, padding included; longer chunks are cut into pieces of the last."""

QUERIES = {"cpu": 256, "cuda": 1024}
"""Queries of a call at most; on a GPU launches cost more than padding."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Queries that are attended with at once.

    Attributes:
        tokens: int64 [b * t], place of each query among the step's tokens; any for padding.
        real: int64, which of them are no padding; None if all are.
        rows: Their sequences; a piece of a chunk is one, that ends with the piece.
    """

    tokens: torch.Tensor
    real: torch.Tensor | None
    rows: PagedRows

    def take(self, query: torch.Tensor) -> torch.Tensor:
        """Queries [b, t, ...] of a step's [tokens, ...]."""
        return query[self.tokens].unflatten(0, (self.rows.counts.shape[0], -1))

    def put(self, out: torch.Tensor, output: torch.Tensor) -> None:
        """Writes outputs [b, t, ...] to a step's."""
        flat = out.flatten(0, 1)
        if self.real is None:
            output[self.tokens] = flat
        else:
            output[self.tokens[self.real]] = flat[self.real]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Successive queries of a request.

    Attributes:
        request: Which.
        first: Place of the first among the step's tokens.
        count: How many.
        behind: Tokens of the request behind the last of them.
    """

    request: int
    first: int
    count: int
    behind: int


def plan_calls(
    starts: Sequence[int], seq_lens: torch.Tensor, block_table: torch.Tensor, sizes: Sequence[int]
) -> list[Call]:
    """The calls of a step. Nothing is read back from the device.

    Args:
        starts: First token of each request, and the end of the last.
        seq_lens: Integers [requests], tokens of each request with those of the step, on the device.
        block_table: int32 [requests, blocks], likewise.
        sizes: Of calls, ascending.

    Example:
        >>> lengths, table = torch.tensor([5, 300], dtype=torch.int32), torch.zeros(2, 8, dtype=torch.int32)
        >>> calls = plan_calls([0, 1, 301], lengths, table, SIZES["cpu"])
        >>> [(call.rows.counts.tolist(), call.rows.lengths.tolist()) for call in calls]
        [([1], [5]), ([44], [300]), ([256], [256])]
    """
    pieces: dict[int, list[Piece]] = {size: [] for size in sizes}
    for request, (start, end) in enumerate(itertools.pairwise(starts)):
        for first in range(start, end, sizes[-1]):
            count = min(end - first, sizes[-1])
            size = next(size for size in sizes if size >= count)
            pieces[size].append(Piece(request, first, count, end - first - count))
    calls = []
    for size, found in pieces.items():
        together = max(QUERIES[seq_lens.device.type] // size, 1)
        parts = (found[i : i + together] for i in range(0, len(found), together))
        calls += [_call(part, size, seq_lens, block_table) for part in parts]
    return calls


def _call(pieces: list[Piece], size: int, seq_lens: torch.Tensor, block_table: torch.Tensor) -> Call:
    padding = (1 << (len(pieces) - 1).bit_length()) - len(pieces)  # few sizes, so that few are compiled
    device = seq_lens.device
    request, count, behind = torch.tensor(
        [[p.request, p.count, p.behind] for p in pieces] + [[0, 0, 0]] * padding, dtype=torch.int64
    ).T.to(device)
    places = [p.first + min(i, p.count - 1) for p in pieces for i in range(size)] + [0] * (padding * size)
    real = [n * size + i for n, p in enumerate(pieces) for i in range(p.count)]
    exists = count > 0
    rows = PagedRows(
        table=block_table[request].int().contiguous(),
        lengths=torch.where(exists, seq_lens[request] - behind, 0).int(),
        counts=count.int(),
    )
    return Call(
        tokens=torch.tensor(places, device=device),
        real=None if len(real) == len(places) else torch.tensor(real, device=device),
        rows=rows,
    )
