"""A decoder in Flax NNX over a compressed KV cache.

Layers that are alike and follow each other form a run: one block whose parameters carry a leading layer axis, run by
one `lax.scan`. On a GPU every layer is a run of its own: XLA copies the slice of a layer before a product reads it,
which would make a decoding step three times as slow. On a CPU a run is as long as it can be: 30 layers in one program
take a minute to compile there. One cache holds every layer: cache row `layer * b + sequence` belongs to that layer of
that sequence, so no part of the cache is sliced out or stacked back. If some layers are local (a query sees a sliding
window only) and others are not, each kind has a cache; local layers keep the tokens of one window. `layer_caches` has
both forms.
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
from pallas_kernels.attention import MAX_QUERY_TOKENS
from pallas_kernels.layer import Heads, JointHeads
from tq_jax.attention import Implementation, attend_joint
from tq_jax.models.blocks import linear
from tq_jax.models.causal import causal_attention
from tq_jax.models.config import DecoderConfig, Run, runs_of
from tq_jax.models.families import family_of
from tq_jax.models.last_token import last_places, token_of
from tq_jax.models.layer_caches import (
    Caches,
    counts_after,
    init_layers,
    layer_of,
    map_caches,
    parts_of,
    require_layers,
    with_layer,
)
from tq_jax.models.rope import Turn, rotary_turn

# (heads, not split yet, carry, cache rows int32 [b]; window: int or None, tokens that a query sees, itself included;
# scale: float; softcap: float and sink_logits: [h_q], see `tq_jax.attend`, if the layer has them; only: int32 [b], if
# `run` was given it and only that token of each sequence is wanted of this layer) -> mixed values [b, t, h_q, d],
# [b, 1, h_q, d] with `only`, the carry for the next layer, and arrays that are kept of every layer
LayerMix = Callable[..., tuple[jax.Array, Any, Any]]

FEW_TOKENS = MAX_QUERY_TOKENS
"""Longest chunk whose keys and values wait for the last layer, so that those of all layers are appended at once."""


class Decoder(nnx.Module):
    """A decoder that turns token ids into hidden states and logits, over a cache that the caller holds.

    Args:
        config: The family, sizes and constants.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters.
        unroll: Whether every layer is a run of its own; None means on a GPU.

    Raises:
        NotImplementedError: If the family is not in `families.FAMILIES`.
        ValueError: If the config has experts and the family has none, or the other way round.

    Example:
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48)
        >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
        >>> decoder.logits(decoder.forward(jnp.array([[1, 2, 3]]))).shape
        (1, 3, 64)
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs, unroll: bool | None = None):
        family, dtype = family_of(config), jnp.dtype(dtype)
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

    def init_cache(self, spec: tq.CacheSpec, *, batch: int) -> Caches:
        """An empty cache for all layers.

        Args:
            spec: Spec of the cache of a layer that sees all tokens. Layers with a sliding window keep the tokens of one
                window.
            batch: Number of sequences.

        Returns:
            A cache of `num_layers * batch` rows: a `tq_jax.Cache` if all layers are alike, else a `LayerCaches`.

        Raises:
            ValueError: If the spec has other KV heads or another head_dim than the decoder, or a sliding window, or if
                the batch is empty.
        """
        expected = (self.config.num_kv_heads, self.config.head_dim)
        if (spec.num_kv_heads, spec.head_dim) != expected:
            raise ValueError(
                f"cache spec (num_kv_heads, head_dim): expected {expected}, got {(spec.num_kv_heads, spec.head_dim)}"
            )
        if batch < 1:
            raise ValueError(f"batch: expected at least 1 sequence, got {batch}")
        return init_layers(self.config, spec, batch=batch)

    def forward(self, tokens: jax.Array) -> jax.Array:
        """Exact hidden states, without a cache.

        Args:
            tokens: int32 [b, t]. Right padding may hold any valid id and changes no position before it.

        Returns:
            Hidden states [b, t, dim] after the final norm.
        """

        def mix(joint: JointHeads, carry: None, rows: jax.Array, **options: Any):
            heads = joint.split()
            return causal_attention(heads.query, heads.key, heads.value, **options), None, None

        return self.run(tokens, None, jnp.zeros(tokens.shape[:1], jnp.int32), mix)[0]

    def projections(self, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        """Queries, keys and values of a prompt that runs exactly, for studies of real caches.

        Args:
            tokens: int32 [b, t].

        Returns:
            Hidden states [b, t, dim] after the final norm, and (queries [num_layers * b, t, num_heads, head_dim], keys
            and values [num_layers * b, t, num_kv_heads, head_dim]). Rotary embedding is already applied to queries and
            keys. The first axis has the order of cache rows.
        """

        def mix(joint: JointHeads, carry: None, rows: jax.Array, **options: Any):
            heads = joint.split()
            chunk = heads.query, heads.key, heads.value
            return causal_attention(*chunk, **options), None, chunk

        hidden, _, kept = self.run(tokens, None, jnp.zeros(tokens.shape[:1], jnp.int32), mix)
        return hidden, kept

    def prefill(
        self,
        tokens: jax.Array,
        cache: Caches,
        *,
        lengths: jax.Array | None = None,
        sequences: jax.Array | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, Caches]:
        """Run a prompt with exact attention and append its keys and values to an empty cache.

        Args:
            tokens: int32 [b, t], right-padded.
            cache: From `init_cache` with `batch=b`. It must be empty: the prompt does not attend to its tokens.
            lengths: int32 [b], valid tokens of each sequence; None means all.
            sequences: int32 [b], the sequences of a larger cache that get the prompts; only these must be empty.
            last_only: Whether only the last valid token of each sequence is wanted. A last layer that is a run of its
                own then attends and goes on with that token alone.

        Returns:
            Hidden states [b, t, dim] after the final norm (meaningless in the padding), [b, 1, dim] with last_only, and
            the cache.

        Raises:
            ValueError: If the cache does not have `num_layers * b` rows.
        """
        batch = tokens.shape[0] if sequences is None else cache.rows // self.config.num_layers
        self.require_rows(cache, batch=batch)
        start, only = jnp.zeros(tokens.shape[:1], jnp.int32), last_places(tokens, lengths) if last_only else None
        how: dict[str, Any] = {"attend": causal_attention, "sequences": sequences, "only": only}
        return self._run_prompt(tokens, cache, start, lengths=lengths, **how)

    def _run_prompt(
        self,
        tokens: jax.Array,
        cache: Caches,
        start: jax.Array,
        *,
        lengths: jax.Array | None,
        attend: Callable[..., jax.Array],
        sequences: jax.Array | None = None,
        stride: int = 1,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches]:
        """See `prefill`; every layer mixes by `attend(query, key, value, window=..., scale=...)`, see `LayerMix`."""
        sequences = jnp.arange(tokens.shape[0], dtype=jnp.int32) if sequences is None else sequences
        batch = cache.rows // self.config.num_layers

        def mix(joint: JointHeads, cache: Caches, rows: jax.Array, **options: Any):
            window, heads = options["window"], joint.split()
            own, rows = layer_of(cache, rows // rows.shape[0] * batch + sequences, window=window)
            stored = tq.append(own, heads.key, heads.value, query=heads.query, lengths=lengths, rows=rows)
            mixed = attend(token_of(heads.query, options.get("only")), heads.key, heads.value, **options)
            return mixed, with_layer(cache, stored, window=window), None

        hidden, cache, _ = self.run(tokens, cache, start, mix, stride=stride, only=only)
        return hidden, cache

    def extend(
        self,
        tokens: jax.Array,
        cache: Caches,
        *,
        lengths: jax.Array | None = None,
        as_stored: bool = False,
        last_only: bool = False,
        implementation: Implementation = "auto",
        precise: bool = False,
    ) -> tuple[jax.Array, Caches]:
        """Attend over the tokens of the cache and, exactly, over those of a chunk, and append the chunk.

        Args:
            tokens: int32 [b, t], right-padded. t = 1 is a step of decoding, t > 1 a teacher-forced chunk.
            cache: From `prefill` or an earlier `extend`, or empty.
            lengths: int32 [b], valid tokens of this chunk per sequence; None means all. A sequence with 0 valid tokens
                stays as it was.
            as_stored: Whether tokens of the chunk see each other as the cache holds them, as for the study of a cache:
                each layer appends the chunk first and attends then. Local layers then need a cache that keeps more than
                a window: `tq_jax.init_cache(spec, batch=num_layers * b)` keeps all tokens of all layers.
            last_only: See `prefill`; not with as_stored. The last layer of few tokens runs whole.
            implementation: Implementation of attention, see `tq_jax.attend`.
            precise: Whether attention is precise, see `tq_jax.attend`.

        Returns:
            Hidden states [b, t, dim] after the final norm (meaningless in the padding), [b, 1, dim] with last_only, and
            the cache. Of a sequence with 0 valid tokens they are meaningless.

        Raises:
            ValueError: If the cache does not have `num_layers * b` rows, or with as_stored no longer holds what
                the chunk sees, or for as_stored with last_only.
        """
        self.require_rows(cache, batch=tokens.shape[0])
        if as_stored and last_only:
            raise ValueError("expected one of as_stored and last_only, got both")
        how: dict[str, Any] = {"lengths": lengths, "implementation": implementation, "precise": precise}
        few = tokens.shape[1] <= FEW_TOKENS and not as_stored
        start = self._lengths(cache, batch=tokens.shape[0])
        only = last_places(tokens, lengths) if last_only else None

        def mix_few(joint: JointHeads, cache: Caches, rows: jax.Array, **options: Any):
            own, rows = layer_of(cache, rows, window=options["window"])
            mixed, heads = self._attend_joint(joint, own, rows=rows, **options, **how)
            return mixed, cache, (heads.query, heads.key, heads.value)

        def mix_many(joint: JointHeads, cache: Caches, rows: jax.Array, **options: Any):
            window, heads = options["window"], joint.split()
            own, rows = layer_of(cache, rows, window=window)
            new = heads.key, heads.value
            stored = self._append(own, *new, query=heads.query, lengths=lengths, rows=rows, start=start)
            chunk, read = (None, stored) if as_stored else (new, own)
            wanted = token_of(heads.query, options.get("only"))
            mixed = self._attend(wanted, read, chunk=chunk, rows=rows, **options, **how)
            return mixed, with_layer(cache, stored, window=window), None

        mix, wanted = (mix_few, None) if few else (mix_many, only)
        hidden, cache, kept = self.run(tokens, cache, start, mix, only=wanted)
        if few:
            # One append for all layers, or one for each kind.
            def append(cache: tq.Cache, query: jax.Array, *chunk: jax.Array) -> tq.Cache:
                key, value, counts, first = chunk
                return self._append(cache, key, value, query=query, lengths=counts, start=first)

            counts, first = (jnp.tile(x, self.config.num_layers) for x in (counts_after(hidden, lengths), start))
            cache = map_caches(append, cache, *kept, counts, first)
            hidden = token_of(hidden, only)
        return hidden, cache

    def _lengths(self, cache: Caches, *, batch: int) -> jax.Array:
        """Tokens of each sequence, int32 [b]."""
        return parts_of(cache)[0].length[:batch]

    def _attend(
        self, query: jax.Array, cache: tq.Cache, *, chunk: Any, window: int | None, **options: Any
    ) -> jax.Array:
        """How a layer attends over the cache and a chunk; see `tq_jax.attend`."""
        return tq.attend(query, cache, chunk=chunk, sliding_window=window, **options)

    def _attend_joint(
        self, joint: JointHeads, cache: tq.Cache, *, window: int | None, **options: Any
    ) -> tuple[jax.Array, Heads]:
        """How a layer attends over the cache and a few tokens that follow, whose heads are not split yet."""
        return attend_joint(joint, cache, sliding_window=window, **options)

    def _append(self, cache: tq.Cache, *chunk: jax.Array, start: jax.Array, **options: Any) -> tq.Cache:
        """How tokens are appended that begin at position `start` of their sequences; see `tq_jax.append`."""
        return tq.append(cache, *chunk, **options)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of the next token.

        Args:
            hidden: Hidden states [b, t, dim] after the final norm.

        Returns:
            float32 [b, t, vocab_size].
        """
        table = self.embedding.embedding if self.head is None else self.head.kernel
        logits = jnp.einsum("btc,vc->btv", hidden, table[...], preferred_element_type=jnp.float32)
        softcap = self.config.final_softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def run(
        self,
        tokens: jax.Array,
        carry: Any,
        start: jax.Array,
        mix: LayerMix,
        *,
        stride: int = 1,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """Run tokens with a function of the caller that attends and keeps keys and values.

        Args:
            tokens: int32 [b, t].
            carry: Any pytree; `mix` of one layer hands it to that of the next.
            start: int32 [b], position of the first token of each sequence.
            mix: Mixes the values of a layer.
            stride: Distance of the positions of consecutive tokens.
            only: int32 [b], the token of each sequence whose hidden state is wanted; None for all tokens. A last layer
                that is a run of its own goes on with that token alone, and its `mix` is told so.

        Returns:
            Hidden states [b, t, dim], [b, 1, dim] with `only`, after the final norm, the carry after the last layer,
            and the arrays that `mix` keeps: those of all layers in the order of cache rows, [num_layers * b, ...].
        """
        b, t = tokens.shape
        positions = start[:, None] + stride * jnp.arange(t, dtype=jnp.int32)[None, :]
        sequences = jnp.arange(b, dtype=jnp.int32)
        softcap = self.config.attention_softcap
        options = {"scale": self.config.attention_scale} | ({} if softcap is None else {"softcap": softcap})
        turns = {kind: self._turn(positions, *kind) for kind in {(run.window, run.rotary) for run in self.runs}}
        hidden = self._embed(tokens)
        state, kept = (hidden, jnp.zeros_like(hidden), carry), []
        for run, blocks in zip(self.runs, self.blocks, strict=True):
            mix_run = partial(mix, window=run.window, **options)
            layer = partial(_layer, turn=turns[run.window, run.rotary], mix=mix_run, sequences=sequences)
            if run.count == 1:
                graph, arrays = nnx.split(blocks)
                alone = nnx.merge(graph, jax.tree.map(lambda x: x[0], arrays))
                last, inputs = run is self.runs[-1], (jnp.int32(run.first), alone)
                state, found = layer(state, inputs, only=only if last else None)
                kept.append(found)
            else:
                state, found = lax.scan(layer, state, (run.first + jnp.arange(run.count, dtype=jnp.int32), blocks))
                kept.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found))
        hidden, added, carry = state
        if hidden.shape[1] == t:
            hidden, added = token_of(hidden, only), token_of(added, only)
        return self.norm(hidden, added)[1], carry, jax.tree.map(lambda *x: jnp.concatenate(x), *kept)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        hidden = self.embedding(tokens)
        return hidden if self.embedding_scale is None else hidden * jnp.asarray(self.embedding_scale, hidden.dtype)

    def _turn(self, positions: jax.Array, window: int | None, rotary: bool) -> Turn:
        config, (base, scaling) = self.config, self.config.rope(window)
        turning = config.rotary_dim if rotary else 0
        return rotary_turn(positions, head_dim=config.head_dim, base=base, scaling=scaling, rotary_dim=turning)

    def require_rows(self, cache: Caches, *, batch: int) -> None:
        """Raises ValueError if a cache lacks rows (there are `num_layers * batch`) or tokens that layers see."""
        require_layers(self.config, cache, batch=batch)


def _layer(
    state: tuple[jax.Array, jax.Array, Any],
    inputs: tuple[jax.Array, Any],
    *,
    turn: Turn,
    mix: LayerMix,
    sequences: jax.Array,
    only: jax.Array | None = None,
) -> tuple[tuple[jax.Array, jax.Array, Any], Any]:
    """One layer: the state after it, and the arrays that `mix` keeps."""
    (hidden, added, carry), (index, block) = state, inputs
    rows = index * sequences.shape[0] + sequences

    def mix_here(joint: JointHeads, **own: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        mixed, after, kept = mix(joint, carry, rows, **own, **({} if only is None else {"only": only}))
        return mixed, (after, kept)

    hidden, added, (carry, kept) = block(hidden, added, turn, mix_here, only=only)
    return (hidden, added, carry), kept
