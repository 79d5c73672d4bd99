"""The kernels of one torch-owned cache, and CUDA graphs that append a token and attend for it in one replay.

Appending and attending are six launches. With few rows, their host time is most of the time of a decoded token. A CUDA
graph of both is one launch; one more launch copies the inputs to the addresses that the graph was captured with.
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
    """Append and attention kernels of one cache; made once, and again when the cache's tensors are replaced.

    Args:
        cache: Tensors of the cache.
        pool: Memory of the CUDA graphs.
    """

    def __init__(self, cache: tq.Cache, pool: GraphPool) -> None:
        self._cache, self._pool = cache, pool
        self._graphs: dict[Any, TensorGraph | None] = {}

    @functools.cached_property
    def append(self) -> KernelAppend:
        """The launches that append a chunk."""
        return KernelAppend(self._cache)

    @functools.cached_property
    def attend(self) -> KernelAttention:
        """The launches that attend for a chunk."""
        return KernelAttention(self._cache)

    def prepare_replay(self, given: Sequence[torch.Tensor], options: dict[str, Any]) -> None:
        """Notes that a chunk like this one has run, so that a capture has no kernels left to load.

        Args:
            given: Inputs of the call, as for `replay`.
            options: Fields of `AttendOptions`.
        """
        self._graphs[_signature(given, options)] = None

    def replay(self, given: Sequence[torch.Tensor], options: dict[str, Any]) -> torch.Tensor | None:
        """Appends a chunk and attends for it by a CUDA graph.

        Args:
            given: Keys, values and queries, each [rows, t, heads, d], and sink logits [h_q] if there are any.
            options: Fields of `AttendOptions`.

        Returns:
            The outputs; None, and the cache is unchanged, if no such call was prepared.
        """
        signature = _signature(given, options)
        if signature not in self._graphs:
            return None
        graph = self._graphs[signature] = self._graphs[signature] or self._capture(given, AttendOptions(**options))
        graph.replay(given)
        return graph.out.clone()

    def _capture(self, given: Sequence[torch.Tensor], options: AttendOptions) -> TensorGraph:
        def launch(k: torch.Tensor, v: torch.Tensor, query: torch.Tensor, *sinks: torch.Tensor) -> torch.Tensor:
            self.append(k, v)
            return self.attend(query, options, *sinks)

        return TensorGraph(launch, given, self._pool)


def _signature(given: Sequence[torch.Tensor], options: dict[str, Any]) -> tuple[Any, ...]:
    """Options, shapes, types and devices: calls with equal signatures share a graph."""
    return (*options.items(), *((x.shape, x.dtype, x.device) for x in given))
