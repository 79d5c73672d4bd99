"""The two compiled programs of `generate_many`: prompts into free rows, and steps of decoding for all rows.

A row is a sequence: it has one cache row per layer, `layer * rows + row`. Both programs change the cache in place.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import tq_jax as tq
from pallas_kernels.pytree import pytree
from tq_jax.attention import Implementation
from tq_jax.models.decoder import Decoder
from tq_jax.models.layer_caches import Caches, map_caches
from tq_jax.models.sampling import Sampling, sample
from tq_jax.statistics import empty_statistics


@pytree
class Rows:
    """What decoding knows of each row; a pytree.

    Attributes:
        prompt: int32 [r], index of the prompt, from which its random key comes.
        token: int32 [r], the latest token, not yet in the cache.
        count: int32 [r], new tokens so far.
        limit: int32 [r], largest number of new tokens.
        done: bool [r], whether the row has ended or was never filled; such a row appends nothing.
    """

    prompt: jax.Array
    token: jax.Array
    count: jax.Array
    limit: jax.Array
    done: jax.Array


@pytree
class Batch:
    """Prompts that are to fill rows, as arrays of numpy or JAX; a pytree.

    Attributes:
        tokens: int32 [n, t], right-padded prompts.
        lengths: int32 [n], tokens of each prompt; 0 for an entry that fills nothing.
        rows: int32 [n], the row of each prompt, all different; an entry that fills nothing names any other row.
        prompt: int32 [n], index of each prompt.
        limit: int32 [n], largest number of new tokens of each prompt.
    """

    tokens: Any
    lengths: Any
    rows: Any
    prompt: Any
    limit: Any


@pytree
class FlatDecoder:
    """A decoder as a list of its arrays, for calls of which many follow each other.

    A call that walks through the modules of 32 layers takes 10 ms of the host's time, one with their 195 arrays 0.1 ms.

    Attributes:
        arrays: The parameters.
        tree: Their places in the decoder (static).
    """

    arrays: list[jax.Array]
    tree: Any = field(metadata={"static": True})

    @classmethod
    def of(cls, decoder: Decoder) -> FlatDecoder:
        """The arrays of a decoder, without a copy."""
        return cls(*jax.tree.flatten(decoder))

    def whole(self) -> Decoder:
        """The decoder."""
        return jax.tree.unflatten(self.tree, self.arrays)


def empty_rows(rows: int) -> Rows:
    """Rows of which none is filled.

    Args:
        rows: Number of rows.
    """
    zeros = jnp.zeros(rows, jnp.int32)
    return Rows(prompt=zeros, token=zeros, count=zeros, limit=zeros, done=jnp.ones(rows, bool))


@partial(jax.jit, static_argnames=("sampling",), donate_argnames=("cache",))
def fill_rows(
    flat: FlatDecoder,
    batch: Batch,
    rows: Rows,
    cache: Caches,
    key: jax.Array,
    stop: jax.Array,
    *,
    sampling: Sampling,
) -> tuple[jax.Array, Rows, Caches]:
    """Empty some rows, run prompts exactly, keep their keys and values in these rows, and draw their first tokens.

    Args:
        flat: The decoder.
        batch: n prompts and their rows.
        rows: State of r rows, n at most r.
        cache: Cache of `num_layers * r` rows; donated. Rows that the batch does not fill stay as they are.
        key: Random key of the whole call.
        stop: int32 [s], token ids that end a sequence.
        sampling: How tokens are drawn.

    Returns:
        The first new tokens, int32 [n] (meaningless for entries that fill nothing), the rows and the cache.
    """
    decoder, n, total = flat.whole(), batch.tokens.shape[0], rows.token.shape[0]
    fills = batch.lengths > 0
    fresh = jnp.zeros(total, bool).at[batch.rows].set(fills)
    cache = emptied(cache, jnp.tile(fresh, decoder.config.num_layers))

    prompts: dict[str, Any] = {"lengths": batch.lengths, "sequences": batch.rows}
    last, cache = decoder.prefill(batch.tokens, cache, last_only=True, **prompts)
    count = jnp.ones(n, jnp.int32)
    keys = _keys_at(_sequence_keys(key, batch.prompt), count - 1)
    first = sample(decoder.logits(last)[:, 0], keys, sampling)
    new = Rows(batch.prompt, first, count, batch.limit, _stops(first, stop) | (batch.limit <= 1))

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[batch.rows].set(jnp.where(fills, new, old[batch.rows]))

    return first, jax.tree.map(put, rows, new), cache


@partial(jax.jit, static_argnames=("sampling", "steps", "implementation", "precise"), donate_argnames=("cache",))
def advance_rows(
    flat: FlatDecoder,
    rows: Rows,
    cache: Caches,
    idle: jax.Array,
    key: jax.Array,
    stop: jax.Array,
    *,
    sampling: Sampling,
    steps: int,
    implementation: Implementation,
    precise: bool,
) -> tuple[jax.Array, Rows, Caches]:
    """Draw `steps` tokens for every row, fewer for those that end before.

    The number of steps is known to the compiler: a loop that asks the device whether to go on would make the host wait
    for every step.

    Args:
        flat: The decoder.
        rows: State of r rows.
        cache: Cache of `num_layers * r` rows; donated. The rows of sequences that have ended are emptied.
        idle: bool [r], rows that belong to no prompt, whatever their state says.
        key: Random key of the whole call.
        stop: int32 [s], token ids that end a sequence.
        sampling: How tokens are drawn.
        steps: Number of steps.
        implementation: Implementation of attention, see `tq_jax.attend`.
        precise: Whether attention is precise, see `tq_jax.attend`.

    Returns:
        The drawn tokens int32 [r, steps] (-1 where there is none), the rows and the cache.
    """
    decoder, rows = flat.whole(), dataclasses.replace(rows, done=rows.done | idle)
    # Attention reads every token of a row, so a row without work had better have none.
    cache = emptied(cache, jnp.tile(rows.done, decoder.config.num_layers))
    keys = _sequence_keys(key, rows.prompt)

    def advance(state: tuple[Rows, Caches], _: None) -> tuple[tuple[Rows, Caches], jax.Array]:
        rows, cache = state
        live = (~rows.done).astype(jnp.int32)
        hidden, cache = decoder.extend(
            rows.token[:, None], cache, lengths=live, implementation=implementation, precise=precise
        )
        drawn = sample(decoder.logits(hidden)[:, 0], _keys_at(keys, rows.count), sampling)
        token, count = jnp.where(rows.done, rows.token, drawn), rows.count + live
        done = rows.done | _stops(token, stop) | (count >= rows.limit)
        after = dataclasses.replace(rows, token=token, count=count, done=done)
        return (after, cache), jnp.where(rows.done, -1, drawn)

    (rows, cache), out = lax.scan(advance, (rows, cache), length=steps)
    return out.T, rows, cache


def emptied(cache: Caches, mask: jax.Array) -> Caches:
    """The cache with some rows as `init_cache` makes them; what lies in their slots and pages is never read.

    Args:
        cache: The cache, of R cache rows.
        mask: bool [R], the cache rows to empty.
    """

    def emptied_one(cache: tq.Cache, mask: jax.Array) -> tq.Cache:
        statistics = cache.statistics
        if statistics is not None:
            empty = empty_statistics(cache.rows, cache.spec.num_kv_heads, cache.spec.head_dim)
            statistics = jax.tree.map(
                lambda old, new: jnp.where(mask.reshape(-1, *[1] * (old.ndim - 1)), new, old), statistics, empty
            )
        return dataclasses.replace(
            cache,
            length=jnp.where(mask, 0, cache.length),
            compressed=jnp.where(mask, 0, cache.compressed),
            overflow=cache.overflow & ~mask,
            statistics=statistics,
        )

    return map_caches(emptied_one, cache, mask)


def _stops(token: jax.Array, stop: jax.Array) -> jax.Array:
    """Whether each token, int32 [r], ends its sequence."""
    return jnp.any(token[:, None] == stop[None, :], axis=1)


def _sequence_keys(key: jax.Array, prompt: jax.Array) -> jax.Array:
    """Keys [r] as `generate` derives them for a batch of one prompt and the key `fold_in(key, prompt)`."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, index), 0))(prompt)


def _keys_at(keys: jax.Array, count: jax.Array) -> jax.Array:
    """The keys [r] of the token after the first `count` new tokens, int32 [r]."""
    return jax.vmap(jax.random.fold_in)(keys, count)
