"""A Llama-family decoder in Flax NNX over a compressed key-value cache.

All blocks are one `Block` whose parameters carry a leading layer axis, run by one `lax.scan`: compile time is that
of one layer. One cache holds every layer; row ``layer * b + sequence`` belongs to that layer of that sequence, so
nothing of the cache is ever sliced out or stacked back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import tq_jax as tq
from tq_jax.attention import Implementation
from tq_jax.models.causal import causal_attention
from tq_jax.models.config import DecoderConfig
from tq_jax.models.rope import rotary_angles, rotate

# (query [b, t, h_q, d], key, value [b, t, h_kv, d]) -> (mixed values [b, t, h_q, d], what the caller carries on)
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv:1910.07467), in float32; nnx.RMSNorm promotes dtypes implicitly."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((config.dim,), dtype))
        self.epsilon = config.norm_eps

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Norm of [b, t, dim]."""
        wide = hidden.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(self.epsilon))
        return wide.astype(hidden.dtype) * self.scale[...][None, None, :]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; how tokens mix is the caller's `Mix`."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.query = _linear(config.dim, config.num_heads * config.head_dim, dtype=dtype, rngs=rngs)
        self.key = _linear(config.dim, config.num_kv_heads * config.head_dim, dtype=dtype, rngs=rngs)
        self.value = _linear(config.dim, config.num_kv_heads * config.head_dim, dtype=dtype, rngs=rngs)
        self.output = _linear(config.num_heads * config.head_dim, config.dim, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array, angles: jax.Array, mix: Mix) -> tuple[jax.Array, Any]:
        """Mix hidden states [b, t, dim] turned by angles [b, t, head_dim / 2]; also the cache afterwards."""
        query, key, value = (
            projection(hidden).reshape(*hidden.shape[:2], -1, self.head_dim)
            for projection in (self.query, self.key, self.value)
        )
        mixed, cache = mix(rotate(query, angles), rotate(key, angles), value)
        return self.output(mixed.reshape(*hidden.shape[:2], -1)), cache


class SwiGLU(nnx.Module):
    """Gated feed-forward block, silu(gate) * up (arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate = _linear(config.dim, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.up = _linear(config.dim, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.down = _linear(config.ffn_dim, config.dim, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Feed-forward of [b, t, dim]."""
        return self.down(jax.nn.silu(self.gate(hidden)) * self.up(hidden))


class Block(nnx.Module):
    """One pre-norm layer. A family with biases or more norms is another class with this call."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(config, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array, angles: jax.Array, mix: Mix) -> tuple[jax.Array, Any]:
        """Hidden states [b, t, dim] to the next layer's, and the cache afterwards."""
        mixed, cache = self.attention(self.attention_norm(hidden), angles, mix)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), cache


class Decoder(nnx.Module):
    """Token ids to hidden states to logits, over a cache that the caller holds.

    Args:
        config: sizes and constants.
        block: the layer class of the family.
        dtype: dtype of parameters and activations.
        rngs: source of random initial parameters.

    Example:
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48)
        >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
        >>> decoder.logits(decoder.forward(jnp.array([[1, 2, 3]]))).shape
        (1, 3, 64)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        block: Callable[..., nnx.Module] = Block,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(dtype)
        self.config = config
        self.embedding = nnx.Embed(config.vocab_size, config.dim, dtype=dtype, param_dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> nnx.Module:
            return block(config, dtype=dtype, rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = RMSNorm(config, dtype=dtype, rngs=rngs)
        self.head = nnx.data(None)
        if not config.tied_head:
            self.head = _linear(config.dim, config.vocab_size, dtype=dtype, rngs=rngs)

    def init_cache(self, spec: tq.CacheSpec, *, batch: int) -> tq.Cache:
        """An empty cache for ``batch`` sequences: ``num_layers * batch`` rows.

        Raises:
            ValueError: the spec's heads or head_dim are not this decoder's, or ``batch`` is not positive.
        """
        expected = (self.config.num_kv_heads, self.config.head_dim)
        if (spec.num_kv_heads, spec.head_dim) != expected:
            raise ValueError(
                f"cache spec (num_kv_heads, head_dim): expected {expected}, got {(spec.num_kv_heads, spec.head_dim)}"
            )
        if batch < 1:
            raise ValueError(f"batch: expected at least 1 sequence, got {batch}")
        return tq.init_cache(spec, batch=self.config.num_layers * batch)

    def forward(self, tokens: jax.Array) -> jax.Array:
        """Exact hidden states without a cache.

        Args:
            tokens: int32 [b, t]; right padding may hold any valid id and changes no position before it.

        Returns:
            [b, t, dim], after the final norm.
        """

        def mix(query: jax.Array, key: jax.Array, value: jax.Array, cache: None, rows: jax.Array):
            return causal_attention(query, key, value), cache

        return self._run(tokens, None, jnp.zeros(tokens.shape[:1], jnp.int32), mix)[0]

    def projections(self, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        """What attention works on when a prompt runs exactly: for studies of real keys and values.

        Args:
            tokens: int32 [b, t].

        Returns:
            Hidden states [b, t, dim] after the final norm; and queries [num_layers * b, t, num_heads, head_dim], keys
            and values [num_layers * b, t, num_kv_heads, head_dim], after rotary embedding, rows as in a cache.
        """
        heads = (self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads)
        rows = self.config.num_layers * tokens.shape[0]
        dtype = self.embedding.param_dtype
        empty = tuple(jnp.zeros((rows, tokens.shape[1], h, self.config.head_dim), dtype) for h in heads)

        def mix(query: jax.Array, key: jax.Array, value: jax.Array, seen: tuple[jax.Array, ...], rows: jax.Array):
            seen = tuple(store.at[rows].set(x) for store, x in zip(seen, (query, key, value), strict=True))
            return causal_attention(query, key, value), seen

        return self._run(tokens, empty, jnp.zeros(tokens.shape[:1], jnp.int32), mix)

    def prefill(
        self, tokens: jax.Array, cache: tq.Cache, *, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, tq.Cache]:
        """Run a prompt with exact attention and append its keys and values to an empty cache.

        Args:
            tokens: int32 [b, t], right-padded.
            cache: from `init_cache` with ``batch=b``; must be empty (what it holds is not attended to).
            lengths: int32 [b], valid tokens of each row; default all.

        Returns:
            Hidden states [b, t, dim] after the final norm (padding rows are meaningless), and the cache.

        Raises:
            ValueError: the cache has not ``num_layers * b`` rows.
        """
        self._check(tokens, cache)

        def mix(query: jax.Array, key: jax.Array, value: jax.Array, cache: tq.Cache, rows: jax.Array):
            cache = tq.append(cache, key, value, query=query, lengths=lengths, rows=rows)
            return causal_attention(query, key, value), cache

        return self._run(tokens, cache, jnp.zeros(tokens.shape[:1], jnp.int32), mix)

    def extend(
        self,
        tokens: jax.Array,
        cache: tq.Cache,
        *,
        lengths: jax.Array | None = None,
        implementation: Implementation = "auto",
    ) -> tuple[jax.Array, tq.Cache]:
        """Append tokens to the cache and attend over all that it then holds.

        Args:
            tokens: int32 [b, t], right-padded; t = 1 decodes, t > 1 is a teacher-forced chunk.
            cache: from `prefill` or an earlier `extend`, or empty.
            lengths: int32 [b], valid tokens of this chunk per row; default all. Zero leaves a row as it was.
            implementation: passed to `tq_jax.attend`.

        Returns:
            Hidden states [b, t, dim] after the final norm (padding rows are meaningless), and the cache.

        Raises:
            ValueError: the cache has not ``num_layers * b`` rows.
        """
        self._check(tokens, cache)

        def mix(query: jax.Array, key: jax.Array, value: jax.Array, cache: tq.Cache, rows: jax.Array):
            cache = tq.append(cache, key, value, query=query, lengths=lengths, rows=rows)
            mixed = tq.attend(query, cache, lengths=lengths, rows=rows, implementation=implementation)
            return mixed.astype(query.dtype), cache

        return self._run(tokens, cache, cache.length[: tokens.shape[0]], mix)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits, float32 [b, t, vocab_size], of hidden states [b, t, dim]."""
        table = self.embedding.embedding if self.head is None else self.head.kernel
        return jnp.einsum("btc,vc->btv", hidden, table[...], preferred_element_type=jnp.float32)

    def _run(
        self,
        tokens: jax.Array,
        cache: Any,
        start: jax.Array,  # int32 [b], position of the first token of each row
        mix: Callable[..., tuple[jax.Array, Any]],
    ) -> tuple[jax.Array, Any]:
        b, t = tokens.shape
        positions = start[:, None] + jnp.arange(t, dtype=jnp.int32)[None, :]
        angles = rotary_angles(positions, head_dim=self.config.head_dim, base=self.config.rope_base)
        sequences = jnp.arange(b, dtype=jnp.int32)

        def layer(carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, Any]):
            hidden, cache = carry
            index, block = inputs
            rows = index * b + sequences
            return block(hidden, angles, lambda q, k, v: mix(q, k, v, cache, rows)), None

        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (hidden, cache), _ = lax.scan(layer, (self.embedding(tokens), cache), (layers, self.blocks))
        return self.norm(hidden), cache

    def _check(self, tokens: jax.Array, cache: tq.Cache) -> None:
        expected = self.config.num_layers * tokens.shape[0]
        if cache.length.shape != (expected,):
            raise ValueError(
                f"cache: expected {expected} rows ({self.config.num_layers} layers x {tokens.shape[0]} sequences), "
                f"got {cache.length.shape[0]}"
            )


def _linear(inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Einsum:
    """A projection whose kernel is [outputs, inputs], as checkpoints store it: loading transposes nothing."""
    return nnx.Einsum("bti,oi->bto", (outputs, inputs), dtype=dtype, param_dtype=dtype, rngs=rngs)
