"""The queries of requests with few of them as calls over all tokens.

vLLM puts requests of few queries first. Successive requests with equally many queries are one call on views of vLLM's
own tensors: no index is made and nothing is gathered, so that a CUDA graph can hold the call. What is left are prompts,
see `interop.vllm.chunks`.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.paged import PagedPool
from interop.torch.paged_rows import PagedRows
from pallas_kernels.numerics import power_of_two


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
