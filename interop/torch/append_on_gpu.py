"""Appending to a torch-owned cache on a GPU by three kernels that torch launches.

`leave` takes the tokens that leave the window, `encode` writes their codes to the pages, and `enter` writes the new
tokens to the window.
"""

from typing import Any

import jax
import jax.numpy as jnp
import torch

import tq_jax as tq
from interop.launcher.program import BoundProgram
from pallas_kernels.append.whole_cache import AppendPlan, append_cache
from pallas_kernels.attention.whole_cache import CacheArrays
from pallas_kernels.encode.encoder import Encoder
from tq_jax.attention import SHARED_FIELDS
from tq_jax.quantizer import encoder

LONGEST = 2048
"""Tokens per launch; the tokens that leave the window meanwhile take as much memory again."""


class KernelAppend:
    """Appends to one cache; made once, and again when the cache's tensors are replaced.

    Args:
        cache: Tensors of the cache.
    """

    def __init__(self, cache: tq.Cache) -> None:
        spec, statistics = cache.spec, cache.statistics
        quantizers = [q for q in (cache.key_quantizer, cache.value_quantizer) if q is not None]
        encoders = tuple(_encoder(q) for q in quantizers) if cache.pages is not None else None
        shared: dict[str, Any] = {name: getattr(cache, name) for name in SHARED_FIELDS}
        arrays: Any = CacheArrays(
            **shared | {"overflow": shared["overflow"].view(torch.uint8)},
            mean=None if statistics is None else statistics.mean,
            weight=None if statistics is None else statistics.weight,
        )
        self._dtype = getattr(torch, spec.dtype)
        self._program = BoundProgram(_BoundAppend(AppendPlan(spec.sinks, spec.max_tokens), encoders), arrays)

    def __call__(self, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Appends a chunk to every row. It only launches, so a CUDA graph can capture it.

        Args:
            k: Keys [rows, t, h_kv, d].
            v: Values, shaped like the keys.
            counts: int32 [rows] on the GPU, number of real tokens in each row's chunk; t by default.
        """
        whole = k.shape[1]
        if whole == 1:
            self._program(k.to(self._dtype).contiguous(), v.to(self._dtype).contiguous(), counts)
            return
        for start in range(0, whole, LONGEST):
            count = min(LONGEST, whole - start)
            size = 1 << (count - 1).bit_length()  # few sizes, so that few kernels are compiled
            part = [x[:, start : start + count].to(self._dtype) for x in (k, v)]
            here = counts
            if whole > LONGEST or size > count:
                left = torch.full(k.shape[:1], whole, dtype=torch.int32, device=k.device) if counts is None else counts
                here = (left - start).clamp(0, count)
            padding = (0, 0, 0, 0, 0, size - count)
            part = [torch.nn.functional.pad(x, padding) if size > count else x.contiguous() for x in part]
            self._program(*part, here)


def _encoder(quantizer: tq.Quantizer) -> Encoder:
    """The encoder of a quantizer whose leaves are tensors; its own arrays live on the host."""
    return encoder(jax.tree.map(lambda x: jnp.asarray(x.cpu().numpy()), quantizer))


class _BoundAppend:
    """`append_cache` with plan and encoders bound; equal for equal encoders, so that layers share a program."""

    def __init__(self, plan: AppendPlan, encoders: tuple[Encoder, ...] | None) -> None:
        self.plan, self.encoders = plan, encoders
        leaves, structure = jax.tree.flatten(encoders)
        self._key = plan, structure, tuple(leaf.tobytes() for leaf in map(jax.device_get, leaves))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BoundAppend) and other._key == self._key

    def __call__(self, arrays: CacheArrays, keys: Any, values: Any, counts: Any) -> CacheArrays:
        key, value = self.encoders or (None, None)
        return append_cache(keys, values, arrays, self.plan, key=key, value=value, counts=counts)
