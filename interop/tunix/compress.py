"""A model of Tunix whose cache is compressed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import tq_jax as tq
from interop.tunix.cache import LayerCache
from interop.tunix.families import own_attention

OF_THE_SAMPLER = ("num_kv_heads", "head_dim", "max_tokens", "sliding_window")
"""Fields of `tq_jax.CacheSpec` that the model and the sampler say."""


@dataclasses.dataclass(frozen=True)
class Compression:
    """How layers are compressed, as arguments of `CacheSpec.recommended`; static and hashable.

    Attributes:
        fields: Names and values of the arguments.
        seed: Seed of the quantizers.
    """

    fields: tuple[tuple[str, Any], ...]
    seed: int

    def spec(self, num_kv_heads: int, head_dim: int, max_tokens: int, dtype: Any) -> tq.CacheSpec:
        """Spec of the cache of a layer; its full-precision tokens have the dtype unless the fields say otherwise."""
        fields = {"dtype": jnp.dtype(dtype).name, **dict(self.fields)}
        return tq.CacheSpec.recommended(num_kv_heads, head_dim, max_tokens, **fields)


class CompressedModel:
    """What `compress` adds to a model."""

    layers: Any
    compression: Compression

    def init_cache(self, batch_size: int, cache_size: int, dtype: Any) -> dict[str, LayerCache]:
        """An empty cache, which the sampler asks for.

        Args:
            batch_size: Sequences.
            cache_size: Most tokens of a sequence.
            dtype: Type of full-precision tokens, unless `compress` was told another.

        Returns:
            A cache per layer: layer_0, layer_1, ...

        Raises:
            ValueError: For sizes that do not fit each other.
            NotImplementedError: For a head_dim or bits that the quantizers do not support.
        """
        caches = {}
        for i, layer in enumerate(self.layers):
            spec = self.compression.spec(layer.attn.num_kv_heads, layer.attn.head_dim, cache_size, dtype)
            caches[f"layer_{i}"] = LayerCache.empty(spec, batch=batch_size, seed=self.compression.seed)
        return caches


@functools.cache
def _with_cache(base: type) -> type:
    """The class of a compressed model; equal for equal models, so that they compile once."""
    return type(f"Compressed{base.__name__}", (CompressedModel, base), {"__doc__": base.__doc__})


def compress(model: Any, *, key_bits: float = 4, value_bits: float = 4, seed: int = 0, **fields: Any) -> Any:
    """A model of Tunix that generates from compressed caches.

    The model is not changed. The new one is an instance of a subclass, with attention layers of subclasses, and shares
    the arrays of all parameters, which have the same names and shapes. Calls without a cache are those of Tunix.

    Args:
        model: A model of Tunix: Llama3, Qwen2, Qwen3, Gemma or Gemma3.
        key_bits: Bits per key coordinate, as in `tq_jax.QuantizerSpec`.
        value_bits: Bits per value coordinate.
        seed: Seed of the quantizers.
        **fields: Further fields of `tq_jax.CacheSpec`: window, sink_tokens, page_size, dtype, whole key and value
            specs in place of the bits, ...; see `tq_jax.CacheSpec.recommended`.

    Returns:
        The new model.

    Raises:
        TypeError: For a field that `tq_jax.CacheSpec` does not have.
        ValueError: For a field that model and sampler say: num_kv_heads, head_dim, max_tokens, sliding_window.
        NotImplementedError: For other models, models that see images, models that are compressed already, and
            parameters that are spread over several devices.
    """
    if given := sorted(set(fields) & set(OF_THE_SAMPLER)):
        raise ValueError(f"expected fields that model and sampler do not say, got {given}")
    theirs, ours = own_attention(model)
    _check(model)
    compression = Compression((("key_bits", key_bits), ("value_bits", value_bits), *sorted(fields.items())), seed)
    new = nnx.merge(*nnx.split(model))
    for layer in new.layers:
        if type(layer.attn) is not theirs:
            raise NotImplementedError(f"expected attention of {theirs}, got {type(layer.attn)}")
        # The object keeps its parameters and projections; only its `block` is another.
        layer.attn.__class__ = ours
    new.__class__ = _with_cache(type(new))
    new.compression = compression
    attention = new.layers[0].attn
    compression.spec(attention.num_kv_heads, attention.head_dim, 1, "float32")  # refuses what fits no cache, now
    return new


def _check(model: Any) -> None:
    """Raises NotImplementedError for models that a compressed cache does not fit."""
    if isinstance(model, CompressedModel):
        raise NotImplementedError(f"expected a model that is not compressed, got {type(model).__name__}")
    if getattr(model.config, "vision_config", None) is not None:
        raise NotImplementedError("images see each other, which no causal cache can: expected vision_config=None")
    devices = {device for x in jax.tree.leaves(nnx.state(model, nnx.Param)) for device in x.devices()}
    if len(devices) > 1:
        raise NotImplementedError(f"a compressed cache of Tunix is on one device, got parameters on {len(devices)}")
