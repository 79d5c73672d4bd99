"""Prompts that run chunk by chunk, and the first token after a prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tq_jax.attention import Implementation
from tq_jax.models.decoder import Decoder
from tq_jax.models.layer_caches import Caches
from tq_jax.models.mesh_step import run_step
from tq_jax.models.sampling import Sampling, sample
from tq_jax.models.sharding import Layout


def run_in_chunks(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Caches,
    keys: jax.Array,
    *,
    chunk: int,
    sampling: Sampling,
    layout: Layout | None = None,
    **how: Any,
) -> tuple[jax.Array, Caches]:
    """Run prompts chunk by chunk after the tokens of a cache, and draw the first new token of each sequence.

    Tokens attend exactly over their own chunk, and over what the cache holds of those before it.

    Args:
        decoder: The decoder.
        tokens: int32 [b, t], right-padded prompts.
        lengths: int32 [b], tokens of each prompt.
        cache: Cache of `num_layers * b` rows; donated.
        keys: Random keys [b], one per sequence.
        chunk: Tokens of each sequence that run at once.
        sampling: How tokens are drawn.
        layout: The mesh on which decoder and cache are spread; None for one device.
        **how: `implementation` and `precise` of `Decoder.extend`.

    Returns:
        The first new tokens, int32 [b], and the filled cache.
    """
    padded = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % chunk)))
    last = jnp.zeros((tokens.shape[0], 1, decoder.config.dim), decoder.embedding.param_dtype)
    for start in range(0, padded.shape[1], chunk):
        part = padded[:, start : start + chunk]
        arrays = {"tokens": part, "left": lengths - start, "last": last}
        last, cache = run_step(_chunk_step, decoder, layout, cache=cache, arrays=arrays, options=how)
    arrays, options = {"last": last, "keys": keys}, {"sampling": sampling}
    return run_step(_draw_step, decoder, layout, cache=cache, arrays=arrays, options=options)


@partial(jax.jit, static_argnames=("implementation", "precise"), donate_argnames=("cache", "last"))
def _chunk_step(
    decoder: Decoder,
    tokens: jax.Array,
    left: jax.Array,
    cache: Caches,
    last: jax.Array,
    *,
    implementation: Implementation,
    precise: bool,
) -> tuple[jax.Array, Caches]:
    """Run a chunk of prompts of which `left` tokens [b] are left.

    Returns the hidden state [b, 1, dim] of each prompt's last token, `last` where that lies in another chunk, and the
    cache.
    """
    lengths = jnp.clip(left, 0, tokens.shape[1])
    how: dict[str, Any] = {"implementation": implementation, "precise": precise, "last_only": True}
    found, cache = decoder.extend(tokens, cache, lengths=lengths, **how)
    ends = (left >= 1) & (left <= tokens.shape[1])
    return jnp.where(ends[:, None, None], found, last), cache


@partial(jax.jit, static_argnames=("sampling",), donate_argnames=("cache",))
def _draw_step(
    decoder: Decoder, cache: Caches, last: jax.Array, keys: jax.Array, *, sampling: Sampling
) -> tuple[jax.Array, Caches]:
    """`draw_first`, and the cache as it is."""
    return draw_first(decoder, last, keys, sampling=sampling), cache


@partial(jax.jit, static_argnames=("sampling",))
def draw_first(decoder: Decoder, last: jax.Array, keys: jax.Array, *, sampling: Sampling) -> jax.Array:
    """The first new token of each sequence, int32 [b], from the hidden state [b, 1, dim] of its last token."""
    return sample(decoder.logits(last)[:, 0], keys_at(keys, jnp.int32(0)), sampling)


def keys_at(keys: jax.Array, step: jax.Array) -> jax.Array:
    """The random keys [b] of one step, from those of each sequence."""
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
