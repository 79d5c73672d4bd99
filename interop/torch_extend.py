"""The kernels of one torch-owned cache, and a token appended and attended to as a CUDA graph.

Appending and attending are six launches, whose host time is most of a decoded token's where rows are few. A graph
of both is one; what it reads is copied to where it was captured by one launch more.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import tq_jax as tq
from interop.torch_append import KernelAppend
from interop.torch_attend import AttendOptions, KernelAttention


class GraphPool:
    """Memory that the CUDA graphs of some caches share, which must never run at the same time; layers do not.

    Copies, by `copy` or `pickle`, are other pools, for a copied cache may run beside the first.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._latest: dict[torch.device, torch.cuda.CUDAGraph] = {}

    @contextlib.contextmanager
    def capture(self, device: torch.device) -> Iterator[torch.cuda.CUDAGraph]:
        """Captures a graph in the block, on a stream of its own; nothing runs and nothing is waited for."""
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream(device)):
            graph.capture_begin(self._handle, capture_error_mode="thread_local")
            try:
                yield graph
            finally:
                graph.capture_end()
        self._latest[device] = graph  # torch has no further use for a pool that no graph is left of

    def __reduce__(self) -> Any:
        return GraphPool, ()


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

    def _capture(self, given: Sequence[torch.Tensor], options: AttendOptions) -> "TensorGraph":
        def launch(k: torch.Tensor, v: torch.Tensor, query: torch.Tensor, *sinks: torch.Tensor) -> torch.Tensor:
            self.append(k, v)
            return self.attend(query, options, *sinks)

        return TensorGraph(launch, given, self._pool)


def _kind(given: Sequence[torch.Tensor], options: dict[str, Any]) -> tuple[Any, ...]:
    """What calls must have in common to share a graph."""
    return (*options.items(), *((x.shape, x.dtype, x.device) for x in given))


class TensorGraph:
    """A function of tensors captured as a CUDA graph.

    Attributes:
        out: What the function gave; replays overwrite it.

    Args:
        function: Gives tensors in some tree. Only launches, and has launched all of it before.
        examples: Tensors like those of every call, on one GPU.
        pool: Where its memory lies.
    """

    def __init__(self, function: Callable[..., Any], examples: Sequence[torch.Tensor], pool: GraphPool) -> None:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written outside of it
            self._given = [torch.empty_like(x) for x in examples]
            with pool.capture(examples[0].device) as self._graph:
                self.out = function(*self._given)

    def replay(self, tensors: Sequence[torch.Tensor]) -> None:
        """Runs it on copies of tensors, on the current stream."""
        given = [x.detach() if x.requires_grad else x for x in tensors]
        torch._foreach_copy_(self._given, given)  # pyright: ignore[reportPrivateImportUsage]
        self._graph.replay()
