"""Decoders with the published sizes of real models and random weights, made on the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tq_jax.models import Decoder, DecoderConfig
from tq_jax.models.sharding import Layout, decoder_shardings

_LLAMA3 = functools.partial(
    DecoderConfig, vocab_size=128256, num_kv_heads=8, rope_base=500000.0, max_context=131072, architecture="llama"
)
_QWEN3 = functools.partial(
    DecoderConfig,
    vocab_size=151936,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_base=1e6,
    norm_eps=1e-6,
    max_context=40960,
    architecture="qwen3",
)

SHAPES: dict[str, DecoderConfig] = {
    "llama3-8b": _LLAMA3(dim=4096, num_layers=32, num_heads=32, head_dim=128, ffn_dim=14336),
    "llama3-70b": _LLAMA3(dim=8192, num_layers=80, num_heads=64, head_dim=128, ffn_dim=28672),
    "llama3-3b": _LLAMA3(dim=3072, num_layers=28, num_heads=24, head_dim=128, ffn_dim=8192, tied_head=True),
    "llama3-1b": _LLAMA3(dim=2048, num_layers=16, num_heads=32, head_dim=64, ffn_dim=8192, tied_head=True),
    "qwen3-8b": _QWEN3(dim=4096, ffn_dim=12288),
    "qwen3-4b": _QWEN3(dim=2560, ffn_dim=9728, tied_head=True),
    "qwen3-30b-a3b": _QWEN3(
        dim=2048, num_layers=48, num_kv_heads=4, ffn_dim=768, num_experts=128, experts_per_token=8,
        architecture="qwen3_moe",
    ),
    "mistral-7b": DecoderConfig(
        vocab_size=32768, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336,
        rope_base=1e6, max_context=32768,
    ),
    "smollm2": DecoderConfig(
        vocab_size=49152, dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, ffn_dim=1536,
        rope_base=1e5, tied_head=True, max_context=8192,
    ),
}  # fmt: skip
"""Published sizes of Llama-3.1-8B and 70B, Llama-3.2-3B and 1B, Qwen3-8B, 4B and 30B-A3B, Mistral-7B-v0.3 and
SmolLM2-135M."""


def random_decoder(config: DecoderConfig, dtype: Any, *, layout: Layout | None = None) -> Decoder:
    """A decoder with random weights, each made on its devices in its own type: nothing is held twice.

    Args:
        config: Sizes.
        dtype: Type of the weights.
        layout: The mesh that it is spread over; None for one device.
    """
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    places = [None] * len(leaves)
    if layout is not None:
        places = jax.tree.leaves(decoder_shardings(abstract, layout.mesh, axes=layout.axes))
    makers: dict[tuple, Callable[[jax.Array], jax.Array]] = {}  # equal arrays share a compiled function
    filled = []
    for index, ((path, leaf), where) in enumerate(zip(leaves, places, strict=True)):
        kind = _kind(jax.tree_util.keystr(path, simple=True, separator="/")), leaf.shape, leaf.dtype
        maker = makers.setdefault((kind, where), jax.jit(functools.partial(_make, *kind), out_shardings=where))
        filled.append(maker(jax.random.key(index)))
    return tree.unflatten(filled)


def _kind(path: str) -> str:
    """What a parameter is by the last name in its path: weights of a norm, a bias, or a matrix."""
    return next((kind for kind in ("scale", "bias") if kind in path.split("/")), "matrix")


def _make(kind: str, shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    if kind != "matrix":
        return jnp.full(shape, kind == "scale", dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)
