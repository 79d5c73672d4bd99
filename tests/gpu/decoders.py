"""Decoders with random weights, and caches for them."""

from typing import Any

from flax import nnx

import tq_jax as tq
from tq_jax.models import Decoder, DecoderConfig

SHAPES = {
    "Llama shape": DecoderConfig(
        vocab_size=32000, dim=4096, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336,
        max_context=1 << 17,
    ),
    "SmolLM2 shape": DecoderConfig(
        vocab_size=49152, dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, ffn_dim=1536,
        tied_head=True, max_context=1 << 17,
    ),
}  # fmt: skip
"""Configurations by name."""


def random_decoder(config: DecoderConfig, dtype: Any) -> Decoder:
    """A decoder with random weights, made on the device."""

    @nnx.jit
    def make() -> Decoder:
        return Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))

    return make()


def cache_spec(config: DecoderConfig, max_tokens: int, bits: int | None) -> tq.CacheSpec:
    """A cache with keys and values of so many bits; None for full precision."""
    heads, dim = config.num_kv_heads, config.head_dim
    if bits is None:
        return tq.CacheSpec.full_precision(num_kv_heads=heads, head_dim=dim, max_tokens=max_tokens)
    quantizer = tq.QuantizerSpec(dim=dim, bits=bits, search=True)
    return tq.CacheSpec(heads, dim, max_tokens, quantizer, quantizer)
