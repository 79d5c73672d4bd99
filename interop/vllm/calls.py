"""The queries of one step as calls: uniform ones for a few queries per request, pieces for prompts over earlier tokens.

vLLM puts requests of few queries first. Successive requests with equally many queries are one call on views of vLLM's
own tensors: no index is made and nothing is gathered, so that a CUDA graph can hold the call. What is left are prompts.
They attend to their own tokens in one call (`interop.vllm.prompts`), and to earlier tokens in pieces of few sizes.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.paged import PagedPool
from interop.torch.paged_rows import PagedRows
from pallas_kernels.numerics import HIDDEN, power_of_two

SIZES = {"cpu": (8, 64, 256), "cuda": (16, 32, 64, 128, 256, 384, 512, 768, 1024)}
"""Queries per sequence of a call over earlier tokens, padding included; longer prompts are cut."""

QUERIES = {"cpu": 256, "cuda": 1024}
"""Most queries per call over earlier tokens, padding included; on a GPU a launch costs more than padding."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Successive requests with equally many queries.

    Attributes:
        first: Index of the first request.
        requests: Number of requests; those of a padded batch that have no queries count as well.
        start: Index of the first query among the tokens of the step.
        queries: Queries per request.
    """

    first: int
    requests: int
    start: int
    queries: int


def split_runs(starts: Sequence[int], threshold: int) -> tuple[list[Run], int]:
    """The runs of requests with few queries at the start of a step, and the index of the first request behind them.

    Args:
        starts: Index of the first token of each request among the tokens of the step, padding included, and the end.
            A padded step is uniform: all requests have equally many queries, but the last may have none.
        threshold: Most queries of a request with few.

    Example:
        >>> split_runs([0, 1, 2, 40, 70], 1)
        ([Run(first=0, requests=2, start=0, queries=1)], 2)
        >>> split_runs([0, 2, 4, 4, 4], 2)
        ([Run(first=0, requests=4, start=0, queries=2)], 4)
    """
    counts = np.diff(starts)
    many = np.flatnonzero(counts > threshold)
    few = int(many[0]) if len(many) else len(counts)
    asking = np.flatnonzero(counts[:few])
    real = int(asking[-1]) + 1 if len(asking) else 0  # behind them are padding
    edges = [0, *(np.flatnonzero(np.diff(counts[:real])) + 1).tolist(), real] if real else [0]
    runs = [Run(first, end - first, starts[first], int(counts[first])) for first, end in itertools.pairwise(edges)]
    if runs and real < few:
        runs[-1] = dataclasses.replace(runs[-1], requests=runs[-1].requests + few - real)
    return runs, few


@dataclasses.dataclass(frozen=True)
class UniformCall:
    """A run of requests, whose queries are the last of their tokens.

    Attributes:
        run: The run.
        rows: Its sequences, padded to a power of two, so that few functions are compiled.
    """

    run: Run
    rows: PagedRows

    def attend(
        self,
        pool: PagedPool,
        query: torch.Tensor,
        output: torch.Tensor,
        options: AttendOptions,
        sinks: torch.Tensor | None,
    ) -> None:
        """Writes the outputs of the run's queries [tokens, h_q, d] of the step to the outputs of the step."""
        run = self.run
        tokens, shape = slice(run.start, run.start + run.requests * run.queries), (run.requests, run.queries)
        asked, out = query[tokens].unflatten(0, shape), output[tokens].unflatten(0, shape)
        padding = self.rows.lengths.shape[0] - run.requests
        if not padding:
            pool.attend(asked, self.rows, options, sinks, out=out)
            return
        padded = torch.nn.functional.pad(asked, (0, 0, 0, 0, 0, 0, 0, padding))
        out.copy_(pool.attend(padded, self.rows, options, sinks)[: run.requests])


class RowBuffers:
    """Rows of batches at addresses that stay, for CUDA graphs; padded to a power of two.

    Args:
        most: Most requests of a batch.
    """

    def __init__(self, most: int) -> None:
        self._most = power_of_two(most)
        self._buffers: PagedRows | None = None

    def rows(self, run: Run, batch: PagedRows, count: int | None = None) -> PagedRows:
        """Rows of a run of a batch.

        The first run's rows are views of the batch's tensors if they need no padding beside the batch's own, else of
        the buffers. A CUDA graph holds a batch that is one run.

        Args:
            run: The run.
            batch: The batch.
            count: Requests of the batch, if rows behind them are padding to a power of two.
        """
        part, size = slice(run.first, run.first + run.requests), power_of_two(run.requests)
        if run.requests == count and batch.lengths.shape[0] == size:
            return batch
        padding = size - run.requests
        if run.first:
            return batch.map(lambda x: torch.cat([x[part], x.new_zeros(padding, *x.shape[1:])]))
        if not padding:
            return batch.map(lambda x: x[part])
        if self._buffers is None:
            self._buffers = batch.map(lambda x: x.new_zeros(self._most, *x.shape[1:]))
        for buffer, x in zip(self._buffers.tensors, batch.tensors, strict=True):
            buffer[: run.requests].copy_(x[part])
            if x.dim() == 1:
                buffer[run.requests :].zero_()
        return self._buffers.map(lambda x: x[:size])


@dataclasses.dataclass(frozen=True)
class EarlierCall:
    """Queries of prompts that attend in one call to the tokens before their chunks.

    Attributes:
        tokens: int64 [b * t], index of each query among the tokens of the prompts; arbitrary for padding.
        real: int64, indices into `tokens` of the queries that are no padding; None if there is no padding.
        rows: The b sequences, without their chunks.
        ahead: int32 [b], tokens between each sequence and its first query.
    """

    tokens: torch.Tensor
    real: torch.Tensor | None
    rows: PagedRows
    ahead: torch.Tensor

    def attend(
        self,
        pool: PagedPool,
        query: torch.Tensor,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        options: AttendOptions,
    ) -> None:
        """Writes outputs and log-sum-exp [tokens, h_q] of its queries, of the prompts' queries [tokens, h_q, d]."""
        asked = query[self.tokens].unflatten(0, (self.ahead.shape[0], -1))
        found = [x.flatten(0, 1) for x in pool.attend_before(asked, self.rows, self.ahead, options)]
        tokens = self.tokens
        if self.real is not None:
            tokens, found = tokens[self.real], [x[self.real] for x in found]
        output[tokens] = found[0].to(output.dtype)
        log_sum_exp[tokens] = found[1]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Successive queries of a prompt.

    Attributes:
        request: Index of the request among the prompts.
        first: Index of the first query among the tokens of the prompts.
        count: Number of queries.
        ahead: Number of tokens of the same chunk before the first query.
    """

    request: int
    first: int
    count: int
    ahead: int


def plan_earlier(starts: Sequence[int], continued: Sequence[bool], earlier: PagedRows) -> list[EarlierCall]:
    """Plans the calls over the tokens before the chunks of a step. Nothing is read back from the device.

    Args:
        starts: Index of the first token of each prompt among the tokens of the prompts, and the end of the last one.
        continued: Whether each prompt has earlier tokens.
        earlier: The prompts without their chunks, on the device.

    Returns:
        Calls that have every query of the continued prompts once.

    Example:
        >>> earlier = PagedRows(torch.zeros(2, 8, dtype=torch.int32), torch.tensor([0, 40], dtype=torch.int32))
        >>> calls = plan_earlier([0, 50, 350], [False, True], earlier)
        >>> [(call.rows.lengths.tolist(), call.ahead.tolist(), call.tokens.shape[0]) for call in calls]
        [([40], [256], 64), ([40], [0], 256)]
    """
    kind = earlier.lengths.device.type
    pieces: dict[int, list[Piece]] = {size: [] for size in SIZES[kind]}
    for request, (start, end) in enumerate(itertools.pairwise(starts)):
        if not continued[request]:
            continue
        for first in range(start, end, SIZES[kind][-1]):
            count = min(end - first, SIZES[kind][-1])
            size = next(size for size in SIZES[kind] if size >= count)
            pieces[size].append(Piece(request, first, count, first - start))
    calls = []
    for size, found in pieces.items():
        together = max(QUERIES[kind] // size, 1)
        parts = (found[i : i + together] for i in range(0, len(found), together))
        calls += [_earlier_call(part, size, earlier) for part in parts]
    return calls


def _earlier_call(pieces: list[Piece], size: int, earlier: PagedRows) -> EarlierCall:
    padding = power_of_two(len(pieces)) - len(pieces)  # few sizes, so that few functions are compiled
    device = earlier.lengths.device
    request, ahead, exists = _on_device([[p.request, p.ahead, 1] for p in pieces] + [[0, 0, 0]] * padding, device).T
    places = [p.first + min(i, p.count - 1) for p in pieces for i in range(size)] + [0] * (padding * size)
    real = [n * size + i for n, p in enumerate(pieces) for i in range(p.count)]
    return EarlierCall(
        tokens=_on_device(places, device),
        real=None if len(real) == len(places) else _on_device(real, device),
        rows=earlier.map(lambda x: (x[request] * exists if x.dim() == 1 else x[request]).int()),
        ahead=ahead.int().contiguous(),
    )


def _on_device(numbers: list, device: torch.device) -> torch.Tensor:
    """An int64 tensor of numbers; the copy does not wait for the device."""
    tensor = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def empty_earlier(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and log-sum-exp [tokens, h_q] of queries [tokens, h_q, d] that see no earlier token."""
    return torch.zeros_like(query), query.new_full(query.shape[:2], HIDDEN, dtype=torch.float32)
