"""A decoder in Flax NNX over a compressed KV cache.

Layers that are alike and follow each other form a run: one block whose parameters carry a leading layer axis, run by one
`lax.scan`. On a GPU every layer is a run of its own: XLA copies the slice of a layer before a product reads it, which
would make a decoding step three times as slow. On a CPU a run is as long as it can be: 30 layers in one program take a
minute to compile there. One cache holds every layer: cache row `layer * b + sequence` belongs to that layer of that
sequence, so no part of the cache is sliced out or stacked back.

Local layers (a query sees a sliding window only) keep all their tokens compressed, like the other layers: this is
simple, and takes more memory than a ring of one window would.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import tq_jax as tq
from tq_jax.attention import Implementation
from tq_jax.models.blocks import linear
from tq_jax.models.causal import causal_attention
from tq_jax.models.config import DecoderConfig, Run, runs_of
from tq_jax.models.families import FAMILIES
from tq_jax.models.rope import Turn, rotary_turn

# (query [b, t, h_q, d], key and value [b, t, h_kv, d], cache, cache rows int32 [b]) -> the cache afterwards
Store = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], Any]
# (arguments of `Store`, with the cache that it returned; window: int or None, tokens that a query sees, itself
# included; scale: float) -> mixed values [b, t, h_q, d]
Attend = Callable[..., jax.Array]


class Decoder(nnx.Module):
    """A decoder that turns token ids into hidden states and logits, over a cache that the caller holds.

    Args:
        config: The family, sizes and constants.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters.
        unroll: Whether every layer is a run of its own; None means on a GPU.

    Raises:
        NotImplementedError: If the family is not in `families.FAMILIES`.

    Example:
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48)
        >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
        >>> decoder.logits(decoder.forward(jnp.array([[1, 2, 3]]))).shape
        (1, 3, 64)
    """

    def __init__(
        self, config: DecoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs, unroll: bool | None = None
    ):
        if config.architecture not in FAMILIES:
            raise NotImplementedError(f"architecture {config.architecture!r}: supported are {sorted(FAMILIES)}")
        family, dtype = FAMILIES[config.architecture], jnp.dtype(dtype)
        self.config = config
        self.embedding_scale = config.dim**0.5 if family.scaled_embedding else None
        self.embedding = nnx.Embed(config.vocab_size, config.dim, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.runs = runs_of(config, unroll=jax.default_backend() == "gpu" if unroll is None else unroll)

        def stack(run: Run) -> nnx.Module:
            @nnx.split_rngs(splits=run.count)
            @nnx.vmap
            def make(rngs: nnx.Rngs) -> nnx.Module:
                return family.block(config, dtype=dtype, rngs=rngs)

            return make(rngs)

        self.blocks = nnx.List(stack(run) for run in self.runs)
        self.norm = family.block.norm(config.dim, epsilon=config.norm_eps, dtype=dtype)
        self.head = nnx.data(None)
        if not config.tied_head:
            self.head = linear(config.dim, (config.vocab_size,), dtype=dtype, rngs=rngs)

    def init_cache(self, spec: tq.CacheSpec, *, batch: int) -> tq.Cache:
        """An empty cache for all layers.

        Args:
            spec: Spec of the cache of one layer.
            batch: Number of sequences.

        Returns:
            A cache of `num_layers * batch` rows.

        Raises:
            ValueError: If the spec has other KV heads or another head_dim than the decoder, or if the batch is empty.
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
        """Exact hidden states, without a cache.

        Args:
            tokens: int32 [b, t]. Right padding may hold any valid id and changes no position before it.

        Returns:
            Hidden states [b, t, dim] after the final norm.
        """

        def store(query: jax.Array, key: jax.Array, value: jax.Array, cache: None, rows: jax.Array) -> None:
            return cache

        return self.run(tokens, None, jnp.zeros(tokens.shape[:1], jnp.int32), store, _attend_chunk)[0]

    def projections(self, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        """Queries, keys and values of a prompt that runs exactly, for studies of real caches.

        Args:
            tokens: int32 [b, t].

        Returns:
            Hidden states [b, t, dim] after the final norm, and (queries [num_layers * b, t, num_heads, head_dim], keys
            and values [num_layers * b, t, num_kv_heads, head_dim]). Rotary embedding is already applied to queries and
            keys. The first axis has the order of cache rows.
        """
        heads = (self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads)
        rows = self.config.num_layers * tokens.shape[0]
        dtype = self.embedding.param_dtype
        empty = tuple(jnp.zeros((rows, tokens.shape[1], h, self.config.head_dim), dtype) for h in heads)

        def store(query: jax.Array, key: jax.Array, value: jax.Array, seen: tuple[jax.Array, ...], rows: jax.Array):
            return tuple(past.at[rows].set(x) for past, x in zip(seen, (query, key, value), strict=True))

        return self.run(tokens, empty, jnp.zeros(tokens.shape[:1], jnp.int32), store, _attend_chunk)

    def prefill(
        self, tokens: jax.Array, cache: tq.Cache, *, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, tq.Cache]:
        """Run a prompt with exact attention and append its keys and values to an empty cache.

        Args:
            tokens: int32 [b, t], right-padded.
            cache: From `init_cache` with `batch=b`. It must be empty: the prompt does not attend to its tokens.
            lengths: int32 [b], valid tokens of each sequence; None means all.

        Returns:
            Hidden states [b, t, dim] after the final norm (meaningless in the padding), and the cache.

        Raises:
            ValueError: If the cache does not have `num_layers * b` rows.
        """
        self.require_rows(cache, batch=tokens.shape[0])
        start = jnp.zeros(tokens.shape[:1], jnp.int32)
        return self.run(tokens, cache, start, partial(_append, lengths=lengths), _attend_chunk)

    def extend(
        self,
        tokens: jax.Array,
        cache: tq.Cache,
        *,
        lengths: jax.Array | None = None,
        implementation: Implementation = "auto",
        precise: bool = False,
    ) -> tuple[jax.Array, tq.Cache]:
        """Append tokens to the cache and attend over all tokens that it then holds.

        Args:
            tokens: int32 [b, t], right-padded. t = 1 is a step of decoding, t > 1 a teacher-forced chunk.
            cache: From `prefill` or an earlier `extend`, or empty.
            lengths: int32 [b], valid tokens of this chunk per sequence; None means all. A sequence with 0 valid tokens
                stays as it was.
            implementation: Implementation of attention, see `tq_jax.attend`.
            precise: Whether attention is precise, see `tq_jax.attend`.

        Returns:
            Hidden states [b, t, dim] after the final norm (meaningless in the padding), and the cache.

        Raises:
            ValueError: If the cache does not have `num_layers * b` rows.
        """
        self.require_rows(cache, batch=tokens.shape[0])
        attend = partial(_attend_cache, lengths=lengths, implementation=implementation, precise=precise)
        return self.run(tokens, cache, cache.length[: tokens.shape[0]], partial(_append, lengths=lengths), attend)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of the next token.

        Args:
            hidden: Hidden states [b, t, dim] after the final norm.

        Returns:
            float32 [b, t, vocab_size].
        """
        table = self.embedding.embedding if self.head is None else self.head.kernel
        return jnp.einsum("btc,vc->btv", hidden, table[...], preferred_element_type=jnp.float32)

    def run(
        self,
        tokens: jax.Array,
        cache: Any,
        start: jax.Array,
        store: Store,
        attend: Attend,
    ) -> tuple[jax.Array, Any]:
        """Run tokens with functions of the caller that keep keys and values and attend to them.

        Args:
            tokens: int32 [b, t].
            cache: Any pytree; it is carried through the layers.
            start: int32 [b], position of the first token of each sequence.
            store: Puts the queries, keys and values of a layer into the cache.
            attend: Mixes the values of a layer, given the cache that `store` returned.

        Returns:
            Hidden states [b, t, dim] after the final norm, and the cache.
        """
        b, t = tokens.shape
        positions = start[:, None] + jnp.arange(t, dtype=jnp.int32)[None, :]
        sequences = jnp.arange(b, dtype=jnp.int32)
        turns = {window: self._turn(positions, window) for window in set(self.config.layer_windows)}
        carry = self._embed(tokens), cache
        for run, blocks in zip(self.runs, self.blocks, strict=True):
            attend_run = partial(attend, window=run.window, scale=self.config.attention_scale)

            def layer(
                carry: tuple[jax.Array, Any],
                inputs: tuple[jax.Array, Any],
                turn: Turn = turns[run.window],
                attend: Attend = attend_run,
            ) -> tuple[tuple[jax.Array, Any], None]:
                (hidden, cache), (index, block) = carry, inputs
                rows = index * b + sequences

                def mix(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
                    stored = store(query, key, value, cache, rows)
                    return attend(query, key, value, stored, rows), stored

                return block(hidden, turn, mix), None

            if run.count == 1:
                graph, state = nnx.split(blocks)
                alone = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
                carry, _ = layer(carry, (jnp.int32(run.first), alone))
            else:
                carry, _ = lax.scan(layer, carry, (run.first + jnp.arange(run.count, dtype=jnp.int32), blocks))
        hidden, cache = carry
        return self.norm(hidden), cache

    def _embed(self, tokens: jax.Array) -> jax.Array:
        hidden = self.embedding(tokens)
        return hidden if self.embedding_scale is None else hidden * jnp.asarray(self.embedding_scale, hidden.dtype)

    def _turn(self, positions: jax.Array, window: int | None) -> Turn:
        base, scaling = self.config.rope(window)
        return rotary_turn(positions, head_dim=self.config.head_dim, base=base, scaling=scaling)

    def require_rows(self, cache: tq.Cache, *, batch: int) -> None:
        """Check that a cache has one row per layer and sequence.

        Args:
            cache: The cache.
            batch: Number of sequences.

        Raises:
            ValueError: If the cache does not have `num_layers * batch` rows.
        """
        expected = self.config.num_layers * batch
        if cache.length.shape != (expected,):
            raise ValueError(
                f"cache: expected {expected} rows ({self.config.num_layers} layers x {batch} sequences), "
                f"got {cache.length.shape[0]}"
            )


def _append(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: tq.Cache,
    rows: jax.Array,
    *,
    lengths: jax.Array | None,
) -> tq.Cache:
    """Append the tokens of a layer: the `Store` of a compressed cache."""
    return tq.append(cache, key, value, query=query, lengths=lengths, rows=rows)


def _attend_chunk(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: Any,
    rows: jax.Array,
    *,
    window: int | None,
    scale: float,
) -> jax.Array:
    """Exact attention over the tokens of this call: an `Attend` that does not read the cache."""
    return causal_attention(query, key, value, scale=scale, window=window)


def _attend_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: tq.Cache,
    rows: jax.Array,
    *,
    window: int | None,
    scale: float,
    lengths: jax.Array | None,
    implementation: Implementation,
    precise: bool,
) -> jax.Array:
    """Attention over all tokens of the cache: the `Attend` of a compressed cache."""
    options: dict[str, Any] = dict(sliding_window=window, scale=scale, implementation=implementation, precise=precise)
    mixed = tq.attend(query, cache, lengths=lengths, rows=rows, **options)
    return mixed.astype(query.dtype)
