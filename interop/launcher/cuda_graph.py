"""Functions of tensors captured as CUDA graphs, and the memory that such graphs share."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class GraphPool:
    """Memory that the CUDA graphs of several caches share. These graphs must never run at the same time.

    The layers of a model run one after the other, so they can share a pool. A copy made by `copy` or `pickle` is a pool
    of its own, because a copied cache may run beside the first.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._latest: dict[torch.device, torch.cuda.CUDAGraph] = {}

    @contextlib.contextmanager
    def capture(self, device: torch.device) -> Iterator[torch.cuda.CUDAGraph]:
        """Captures the launches of the block as a graph, on a stream of its own; none of them runs."""
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream(device)):
            graph.capture_begin(self._handle, capture_error_mode="thread_local")
            try:
                yield graph
            finally:
                graph.capture_end()
        self._latest[device] = graph  # torch frees a pool once no graph of it is left

    def __reduce__(self) -> Any:
        return GraphPool, ()


class TensorGraph:
    """A function of tensors captured as a CUDA graph.

    Attributes:
        out: Result of the function; every replay overwrites it.

    Args:
        function: Returns a pytree of tensors. It only launches kernels, all of which have been launched before.
        examples: Tensors on one GPU with the shapes and types of every call.
        pool: Memory of the graph.
    """

    def __init__(self, function: Callable[..., Any], examples: Sequence[torch.Tensor], pool: GraphPool) -> None:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors cannot be written outside inference mode
            self._given = [torch.empty_like(x) for x in examples]
            with pool.capture(examples[0].device) as self._graph:
                self.out = function(*self._given)

    def replay(self, tensors: Sequence[torch.Tensor]) -> None:
        """Runs the graph on copies of the tensors, on the current stream."""
        given = [x.detach() if x.requires_grad else x for x in tensors]
        torch._foreach_copy_(self._given, given)  # pyright: ignore[reportPrivateImportUsage]
        self._graph.replay()
