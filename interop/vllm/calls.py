"""The queries of one step as calls of few shapes: decodes together, chunks of prompts in pieces."""

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
"""Sizes of calls: queries per sequence, padding included. A longer chunk is cut into pieces of the last size."""

QUERIES = {"cpu": 256, "cuda": 1024}
"""Most queries per call, padding included; on a GPU a launch costs more than padding."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Queries that attend in one call, of b sequences with t queries each, padding included.

    Attributes:
        tokens: int64 [b * t], index of each query among the tokens of the step; arbitrary for padding.
        real: int64, indices into `tokens` of the queries that are no padding; None if there is no padding.
        rows: The b sequences. A piece of a chunk is a sequence that ends with the piece.
    """

    tokens: torch.Tensor
    real: torch.Tensor | None
    rows: PagedRows

    def take(self, query: torch.Tensor) -> torch.Tensor:
        """The queries of the call, [b, t, ...], from the queries of the step, [tokens, ...]."""
        return query[self.tokens].unflatten(0, (self.rows.counts.shape[0], -1))

    def put(self, out: torch.Tensor, output: torch.Tensor) -> None:
        """Writes the outputs of the call, [b, t, ...], to the outputs of the step, [tokens, ...]."""
        flat = out.flatten(0, 1)
        if self.real is None:
            output[self.tokens] = flat
        else:
            output[self.tokens[self.real]] = flat[self.real]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Successive queries of a request.

    Attributes:
        request: Index of the request in the step.
        first: Index of the first query among the tokens of the step.
        count: Number of queries.
        behind: Number of tokens of the request after the last query.
    """

    request: int
    first: int
    count: int
    behind: int


def plan_calls(
    starts: Sequence[int], seq_lens: torch.Tensor, block_table: torch.Tensor, sizes: Sequence[int]
) -> list[Call]:
    """Plans the calls of a step. Nothing is read back from the device.

    Args:
        starts: Index of the first token of each request among the tokens of the step, and the end of the last request.
        seq_lens: Integers [requests] on the device: tokens of each request, the tokens of the step included.
        block_table: int32 [requests, blocks] on the device: block of each run of tokens of each request.
        sizes: Sizes of calls, ascending; see `SIZES`.

    Returns:
        Calls that have every query of the step once.

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
    padding = (1 << (len(pieces) - 1).bit_length()) - len(pieces)  # few sizes, so that few functions are compiled
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
