"""Functions of tensors captured as CUDA graphs, and the memory that graphs share."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


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
