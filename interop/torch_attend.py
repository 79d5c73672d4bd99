"""Attention over a torch-owned cache on a GPU by kernels that torch launches: prepare, decode, merge."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import torch

import tq_jax as tq
from interop.torch_kernels import TorchProgram
from pallas_kernels.decode import LogitOptions, fused
from pallas_kernels.decode.triton import MAX_QUERY_TOKENS
from tq_jax.attention import arrays_of
from tq_jax.quantizer import sketch_gain


@dataclasses.dataclass(frozen=True)
class AttendOptions:
    """What is static about a call; hashable. Fields as the arguments of `tq_jax.attend`."""

    sliding_window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    precise: bool = False


class KernelAttention:
    """Attention over one cache; made once, and again when the cache's tensors are replaced.

    Args:
        cache: The cache's tensors.
    """

    def __init__(self, cache: tq.Cache) -> None:
        self._spec = cache.spec
        self._arrays = kernel_arrays(cache)
        self._fixed = jax.tree.leaves(self._arrays)
        self._programs: dict[Any, tuple[TorchProgram, list[int]]] = {}

    def __call__(
        self,
        query: torch.Tensor,
        options: AttendOptions,
        sink_logits: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the latest tokens; see `TorchCache.attend`. Launches only: a CUDA graph can capture it.

        Raises:
            NotImplementedError: For shapes or formats outside the kernels' limits.
        """
        count = query.shape[1]
        if count <= MAX_QUERY_TOKENS:
            return self._launch(query, options, sink_logits, counts)
        # Queries are placed by how many there are from them to the end, so that a block of them says so.
        left = torch.full(query.shape[:1], count, dtype=torch.int32, device=query.device) if counts is None else counts
        starts = range(0, count, MAX_QUERY_TOKENS)
        blocks = (query[:, start : start + MAX_QUERY_TOKENS] for start in starts)
        parts = [
            self._launch(block, options, sink_logits, left - start) for start, block in zip(starts, blocks, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def _launch(
        self, query: torch.Tensor, options: AttendOptions, sink_logits: torch.Tensor | None, counts: torch.Tensor | None
    ) -> torch.Tensor:
        query = query.contiguous()
        key = (query.shape, query.dtype, options, sink_logits is None, counts is None)
        extra = [x for x in (sink_logits, counts) if x is not None]
        if key not in self._programs:
            program = _program(
                _Static(self._spec, options), _shapes((query, self._arrays, sink_logits, counts)), query.device
            )
            self._programs[key] = program, program.check([query, *self._fixed, *extra])[1 : 1 + len(self._fixed)]
        program, fixed = self._programs[key]
        pointers = [query.data_ptr(), *fixed, *(x.data_ptr() for x in extra)]
        return program.launch([query, *self._fixed, *extra], pointers)[0]


def kernel_arrays(cache: tq.Cache) -> fused.CacheArrays:
    """What the kernels read of a cache: its own tensors, and the matrices of its rotations."""
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

    def __call__(self, query: Any, arrays: fused.CacheArrays, sinks: Any, counts: Any) -> tuple[Any]:
        spec, options = self.spec, self.options
        scale = options.scale or float(np.float32(spec.head_dim**-0.5))
        plan = fused.AttendPlan(
            options=LogitOptions(scale, options.softcap, options.sliding_window),
            key_format=None if spec.key is None else spec.key.format,
            value_format=None if spec.value is None else spec.value.format,
            sinks=spec.sinks,
            sketch_gain=sketch_gain(spec.head_dim),
            precise=options.precise,
        )
        return (fused.attend_cache(query, arrays, plan, sink_logits=sinks, counts=counts),)


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """A tree of shapes that can be a key of a cache."""

    leaves: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    structure: Any


def _shapes(tree: Any) -> _Shapes:
    leaves, structure = jax.tree.flatten(tree)
    return _Shapes(tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves), structure)


@functools.lru_cache(maxsize=256)  # the layers of a model share their programs
def _program(function: _Static, shapes: _Shapes, device: torch.device) -> TorchProgram:
    leaves = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes.leaves]
    return TorchProgram(function, *jax.tree.unflatten(shapes.structure, leaves), device=device)
