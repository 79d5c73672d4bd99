"""Tokens encoded into the pages of a torch-owned cache on a GPU, by kernels that torch launches; in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch

import tq_jax as tq
from interop.torch_kernels import TorchProgram
from pallas_kernels.decode import Pages
from pallas_kernels.encode import triton
from pallas_kernels.encode.encoder import Encoder
from tq_jax.quantizer import encoder


class KernelEncoder:
    """Encodes into the pages of one cache; made once, and again when the cache's tensors are replaced.

    Args:
        cache: The cache's tensors.
    """

    def __init__(self, cache: tq.Cache) -> None:
        assert cache.pages is not None and cache.key_quantizer is not None and cache.value_quantizer is not None
        self._pages = cache.pages
        self._dtype = getattr(torch, cache.spec.dtype)
        self._encoders = _encoder(cache.key_quantizer), _encoder(cache.value_quantizer)
        self._programs: dict[Any, TorchProgram] = {}

    def __call__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        mean: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Writes n tokens to their slots.

        Args:
            keys: [n, h_kv, d], of the cache's type.
            values: Likewise.
            slots: [n], page * page_size + place.
            mean: float32 [n, h_kv, d], subtracted from each key; None, with weight, for none.
            weight: Multiplied to it then.
        """
        # Few sizes, so that few are compiled; tokens of slot -1 are not written.
        more = (1 << (len(slots) - 1).bit_length()) - len(slots)
        slots = torch.nn.functional.pad(slots.int(), (0, more), value=-1)
        given = [x for x in (keys, values, mean, weight) if x is not None]
        keys, values, *statistics = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, more)) if more else x for x in given)
        tokens = [x.to(self._dtype)[:, None].contiguous() for x in (keys, values)]
        key = (keys.shape, bool(statistics))
        if key not in self._programs:
            shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(self._pages))
            self._programs[key] = _program(
                tuple(keys.shape), self._dtype, bool(statistics), shapes, _Static(self._encoders), keys.device
            )
        self._programs[key].launch([*tokens, *jax.tree.leaves(self._pages), slots[:, None].contiguous(), *statistics])


def _encoder(quantizer: tq.Quantizer) -> Encoder:
    """The encoder of a quantizer of tensors, on the host."""
    return encoder(jax.tree.map(lambda x: jnp.asarray(x.cpu().numpy()), quantizer))


class _Static:
    """The launches with the encoders bound; equal for equal encoders, so that layers share what is compiled."""

    def __init__(self, encoders: tuple[Encoder, Encoder]) -> None:
        self.encoders = encoders
        leaves, structure = jax.tree.flatten(encoders)
        self._key = structure, tuple(leaf.tobytes() for leaf in map(jax.device_get, leaves))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and other._key == self._key

    def __call__(self, keys: Any, values: Any, pages: Pages, slots: Any, mean: Any, weight: Any) -> Pages:
        key, value = self.encoders
        return triton.encode_pages(
            keys, values, pages, slots, key=key, value=value, mean=mean, weight=weight, interpret=False
        )


@functools.lru_cache(maxsize=64)
def _program(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    statistics: bool,
    pools: tuple[tuple[tuple[int, ...], torch.dtype], ...],
    function: _Static,
    device: torch.device,
) -> TorchProgram:
    def meta(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    tokens = meta((shape[0], 1, *shape[1:]), dtype)
    extra = meta(shape, torch.float32) if statistics else None
    return TorchProgram(
        function,
        tokens,
        tokens,
        [meta(*pool) for pool in pools],
        meta((shape[0], 1), torch.int32),
        extra,
        extra,
        device=device,
    )
