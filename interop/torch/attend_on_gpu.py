"""Attention over a torch-owned cache on a GPU by kernels that torch launches."""

import dataclasses
from typing import Any

import jax
import numpy as np
import torch

import tq_jax as tq
from interop.launcher.function import TorchFunction
from interop.launcher.program import BoundProgram
from pallas_kernels.attention import MAX_QUERY_TOKENS, CacheArrays, LogitOptions, attend_cache
from tq_jax.attention import LONGEST, arrays_of, attend_plan
from tq_jax.attention_checks import check_query


@dataclasses.dataclass(frozen=True)
class AttendOptions:
    """Static options of a call; hashable. The fields are arguments of `tq_jax.attend`."""

    sliding_window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    precise: bool = False

    @property
    def of_logits(self) -> dict[str, float | None]:
        """The numbers, each above 0 if given."""
        return {"sliding_window": self.sliding_window, "softcap": self.softcap, "scale": self.scale}

    def for_head_dim(self, head_dim: int) -> LogitOptions:
        """The options as kernels and the reference take them."""
        return LogitOptions.for_head_dim(
            head_dim, scale=self.scale, softcap=self.softcap, sliding_window=self.sliding_window
        )


class KernelAttention:
    """Attention over one cache; made once, and again when the cache's tensors are replaced.

    Args:
        cache: The cache's tensors.
    """

    def __init__(self, cache: tq.Cache) -> None:
        self._spec = cache.spec
        self._arrays = kernel_arrays(cache)
        self._programs: dict[Any, BoundProgram] = {}

    def __call__(
        self,
        query: torch.Tensor,
        options: AttendOptions,
        sink_logits: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the latest tokens; see `TorchCache.attend`. Launches only: a CUDA graph can capture it.

        Raises:
            ValueError: For shapes or options that do not fit.
            NotImplementedError: For shapes or formats outside the kernels' limits.
        """
        check_query(self._spec, self._arrays.length.shape[0], query, sink_logits, **options.of_logits)
        if not query.numel():
            return torch.zeros_like(query)
        whole = query.shape[1]
        if whole <= MAX_QUERY_TOKENS:
            return self._launch(query, options, sink_logits, counts)
        # Queries are placed by how many there are from them to the end, so that a block of them says so.
        left = torch.full(query.shape[:1], whole, dtype=torch.int32, device=query.device) if counts is None else counts
        parts = []
        for start in range(0, whole, LONGEST):
            block = query[:, start : start + LONGEST]
            size = min(padded_size(block.shape[1]), LONGEST)
            padded = torch.nn.functional.pad(block, (0, 0, 0, 0, 0, size - block.shape[1]))
            parts.append(self._launch(padded, options, sink_logits, left - start)[:, : block.shape[1]])
        return torch.cat(parts, dim=1)

    def _launch(
        self, query: torch.Tensor, options: AttendOptions, sink_logits: torch.Tensor | None, counts: torch.Tensor | None
    ) -> torch.Tensor:
        chunk = query.shape[1] > MAX_QUERY_TOKENS
        if (options, chunk) not in self._programs:
            kind = TorchFunction if chunk else None
            self._programs[options, chunk] = BoundProgram(_Static(self._spec, options), self._arrays, kind=kind)
        return self._programs[options, chunk](query.contiguous(), sink_logits, counts)[0]


def padded_size(count: int) -> int:
    """Query tokens that a chunk is padded to: at most a quarter more, and few sizes, so that few are compiled."""
    step = max(16, 1 << max(count.bit_length() - 3, 0))
    return -(-count // step) * step


def kernel_arrays(cache: tq.Cache) -> CacheArrays:
    """The arrays of a cache that the kernels read: its own tensors, and the matrices of its rotations."""
    device: Any = cache.length.device

    def tensor(leaf: Any) -> torch.Tensor:
        return leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(np.array(leaf)).to(device)

    arrays = jax.tree.map(tensor, arrays_of(cache))
    if cache.spec.dtype != "bfloat16":
        return arrays
    exact = {name: getattr(arrays, name).view(torch.uint16) for name in ("exact_keys", "exact_values")}
    return dataclasses.replace(arrays, **exact)


@dataclasses.dataclass(frozen=True)
class _Static:
    spec: tq.CacheSpec
    options: AttendOptions
    interpret: bool = False

    def __call__(self, arrays: CacheArrays, query: Any, sinks: Any, counts: Any) -> tuple[Any]:
        spec, options = self.spec, self.options
        logits = options.for_head_dim(spec.head_dim)
        plan = attend_plan(spec, logits, precise=options.precise, interpret=self.interpret)
        return (attend_cache(query, arrays, plan, sink_logits=sinks, counts=counts),)
