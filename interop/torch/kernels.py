"""The kernels of one torch-owned cache, and a token appended and attended to as a CUDA graph.

Appending and attending are six launches, whose host time is most of a decoded token's where rows are few. A graph
of both is one; what it reads is copied to where it was captured by one launch more.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

import tq_jax as tq
from interop.launcher.cuda_graph import GraphPool, TensorGraph
from interop.torch.append_on_gpu import KernelAppend
from interop.torch.attend_on_gpu import AttendOptions, KernelAttention


class CacheKernels:
    """Appending and attending on a GPU by kernels; made once, and again when the cache's tensors are replaced.

    Args:
        cache: The cache's tensors.
        pool: Memory of its graphs.
    """

    def __init__(self, cache: tq.Cache, pool: GraphPool) -> None:
        self._cache, self._pool = cache, pool
        self._graphs: dict[Any, TensorGraph | None] = {}

    @functools.cached_property
    def append(self) -> KernelAppend:
        """Appends chunks."""
        return KernelAppend(self._cache)

    @functools.cached_property
    def attend(self) -> KernelAttention:
        """Attends for chunks."""
        return KernelAttention(self._cache)

    def prepare_replay(self, given: Sequence[torch.Tensor], options: dict[str, Any]) -> None:
        """Says that chunks like these were appended and attended to: a capture would load no kernels."""
        self._graphs[_kind(given, options)] = None

    def replay(self, given: Sequence[torch.Tensor], options: dict[str, Any]) -> torch.Tensor | None:
        """Appends a chunk and attends for it by a graph; None, and nothing is done, if that is not prepared.

        Args:
            given: Keys, values and queries, each [rows, t, heads, d], and sink logits if there are any.
            options: Of the attention, as of `AttendOptions`.
        """
        kind = _kind(given, options)
        if kind not in self._graphs:
            return None
        graph = self._graphs[kind] = self._graphs[kind] or self._capture(given, AttendOptions(**options))
        graph.replay(given)
        return graph.out.clone()

    def _capture(self, given: Sequence[torch.Tensor], options: AttendOptions) -> TensorGraph:
        def launch(k: torch.Tensor, v: torch.Tensor, query: torch.Tensor, *sinks: torch.Tensor) -> torch.Tensor:
            self.append(k, v)
            return self.attend(query, options, *sinks)

        return TensorGraph(launch, given, self._pool)


def _kind(given: Sequence[torch.Tensor], options: dict[str, Any]) -> tuple[Any, ...]:
    """What calls must have in common to share a graph."""
    return (*options.items(), *((x.shape, x.dtype, x.device) for x in given))
