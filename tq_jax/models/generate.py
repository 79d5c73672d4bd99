"""Text generation over a compressed cache: one compiled prefill, then one compiled loop of decode steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import tq_jax as tq
from tq_jax.attention import Implementation
from tq_jax.models.decoder import Decoder
from tq_jax.models.sampling import Sampling, sample


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
        tokens: int32 [b, max_new_tokens]; after a row's stop token, -1.
        lengths: int32 [b], tokens of each row, its stop token included.
        cache: holds the prompts and every new token but each row's last; ``num_layers * b`` rows.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: tq.Cache

    def sequences(self) -> list[list[int]]:
        """The new tokens of each row as lists, without padding."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """Right-pad token lists to one array.

    Padded lengths are rounded up, by at most 15 tokens or a quarter, so that prompts of similar lengths share a
    compiled prefill.

    Args:
        prompts: token ids of each sequence, at least one each.

    Returns:
        ``tokens`` int32 [b, t] and ``lengths`` int32 [b].

    Raises:
        ValueError: there are no prompts, or one of them is empty.

    Example:
        >>> tokens, lengths = pad_prompts([[5, 6, 7], [8]])
        >>> tokens.shape, lengths.tolist()
        ((2, 16), [3, 1])
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not all(lengths):
        raise ValueError(f"prompts: expected at least one, each of at least one token, got lengths {lengths}")
    longest = max(lengths)
    step = max(16, 1 << max(longest.bit_length() - 3, 0))
    tokens = np.zeros((len(prompts), -(-longest // step) * step), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


def generate(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    cache_spec: tq.CacheSpec | None = None,
    cache: tq.Cache | None = None,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    key: jax.Array | None = None,
    implementation: Implementation = "auto",
    precise: bool = False,
) -> Generation:
    """Continue a batch of prompts, from the start or from what a cache holds.

    From the start the prompt runs with exact attention; its keys and values go to the cache, over which every new token
    attends. Behind an earlier text the tokens of the prompt attend over the cache too.

    Args:
        decoder: from `load_model` or `Decoder`.
        tokens: int32 [b, t], right-padded prompts; see `pad_prompts`.
        lengths: int32 [b], tokens of each prompt, 1 to t.
        cache_spec: what one layer of one sequence keeps; this or ``cache``.
        cache: what came before the prompts: that of an earlier `Generation` (whose last tokens, which it does not hold,
            then begin these prompts) or of `tq_jax.load_cache`. It is left as it is, and so copied once;
            `tq_jax.resize` makes room for more tokens.
        max_new_tokens: most tokens to add to each row.
        sampling: how tokens are drawn; default greedy.
        stop_tokens: ids that end a row; ``decoder.config.stop_tokens`` for a chat.
        key: random key; needed unless greedy. The same key draws the same tokens.
        implementation: passed to `tq_jax.attend`.
        precise: likewise.

    Returns:
        A `Generation`. The loop ends as soon as every row has stopped.

    Raises:
        ValueError: an empty batch or prompt, ids outside the vocabulary, a prompt with its continuation beyond the
            cache or the model's context, sampling without a key, not one of ``cache_spec`` and ``cache``, or a cache
            of another model or batch, or one that overflowed.

    Example:
        >>> from flax import nnx
        >>> from tq_jax.models import DecoderConfig
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48)
        >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
        >>> spec = tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=8, max_tokens=32, dtype="float32")
        >>> tokens, lengths = pad_prompts([[1, 2, 3], [4]])
        >>> generate(decoder, tokens, lengths, cache_spec=spec, max_new_tokens=5).tokens.shape
        (2, 5)
    """
    sampling = Sampling() if sampling is None else sampling
    if (cache_spec is None) == (cache is None):
        raise ValueError(f"expected one of cache_spec and cache, got {'neither' if cache is None else 'both'}")
    spec = cache.spec if cache is not None else cache_spec
    assert spec is not None
    _check(decoder, tokens, lengths, max_new_tokens, stop_tokens)
    _check_room(decoder, lengths, spec.max_tokens, cache, max_new_tokens)
    if key is None:
        if sampling.temperature:
            raise ValueError(f"key: expected a random key to sample at temperature {sampling.temperature}, got None")
        key = jax.random.key(0)
    batch = np.shape(tokens)[0]
    stop = jnp.asarray(np.array(stop_tokens, np.int32))
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    prompts = jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)
    how = {"implementation": implementation, "precise": precise}
    if cache is None:
        start = decoder.init_cache(spec, batch=batch)
        first, filled = prefill_step(decoder, *prompts, start, keys, sampling=sampling)
    else:
        first, filled = extend_step(decoder, *prompts, cache, keys, sampling=sampling, **how)
    out, count, filled = decode_loop(
        decoder, first, filled, keys, stop, sampling=sampling, max_new_tokens=max_new_tokens, **how
    )
    return Generation(tokens=out, lengths=count, cache=filled)


@partial(jax.jit, static_argnames=("sampling",), donate_argnames=("cache",))
def prefill_step(
    decoder: Decoder, tokens: jax.Array, lengths: jax.Array, cache: tq.Cache, keys: jax.Array, *, sampling: Sampling
) -> tuple[jax.Array, tq.Cache]:
    """Run the prompts and draw the first new token of each row, int32 [b]; ``cache`` is donated."""
    hidden, cache = decoder.prefill(tokens, cache, lengths=lengths)
    return _first(decoder, hidden, lengths, keys, sampling), cache


@partial(jax.jit, static_argnames=("sampling", "implementation", "precise"))
def extend_step(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: tq.Cache,
    keys: jax.Array,
    *,
    sampling: Sampling,
    implementation: Implementation,
    precise: bool,
) -> tuple[jax.Array, tq.Cache]:
    """The same behind what a cache holds, which is left as it is."""
    hidden, cache = decoder.extend(tokens, cache, lengths=lengths, implementation=implementation, precise=precise)
    return _first(decoder, hidden, lengths, keys, sampling), cache


@partial(
    jax.jit, static_argnames=("sampling", "max_new_tokens", "implementation", "precise"), donate_argnames=("cache",)
)
def decode_loop(
    decoder: Decoder,
    first: jax.Array,  # int32 [b], drawn by the prefill
    cache: tq.Cache,
    keys: jax.Array,  # [b]
    stop: jax.Array,  # int32 [s]
    *,
    sampling: Sampling,
    max_new_tokens: int,
    implementation: Implementation,
    precise: bool = False,
) -> tuple[jax.Array, jax.Array, tq.Cache]:
    """Draw up to ``max_new_tokens`` tokens per row, the given first ones included; ``cache`` is donated."""
    batch = first.shape[0]

    def stops(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == stop[None, :], axis=1)

    def alive(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        # A row that has stopped appends nothing and keeps its last token.
        hidden, cache = decoder.extend(
            state.token[:, None],
            state.cache,
            lengths=(~state.done).astype(jnp.int32),
            implementation=implementation,
            precise=precise,
        )
        drawn = sample(decoder.logits(hidden)[:, 0], _at(keys, state.step), sampling)
        token = jnp.where(state.done, state.token, drawn)
        return _State(
            step=state.step + 1,
            token=token,
            done=state.done | stops(token),
            out=state.out.at[:, state.step].set(jnp.where(state.done, -1, drawn)),
            count=state.count + (~state.done).astype(jnp.int32),
            cache=cache,
        )

    start = _State(
        step=jnp.int32(1),
        token=first,
        done=stops(first),
        out=jnp.full((batch, max_new_tokens), -1, jnp.int32).at[:, 0].set(first),
        count=jnp.ones(batch, jnp.int32),
        cache=cache,
    )
    end = lax.while_loop(alive, advance, start)
    return end.out, end.count, end.cache


def time_decode(
    decoder: Decoder,
    first: jax.Array,
    make_cache: Callable[[], tq.Cache],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    repeats: int = 1,
) -> tuple[jax.Array, jax.Array, float]:
    """Decode greedily by the compiled loop and time it, compilation excluded.

    Args:
        decoder: from `load_model` or `Decoder`.
        first: int32 [b], the first token of each row.
        make_cache: makes the filled cache, which a run takes over.
        max_new_tokens: most tokens of each row, the first included.
        stop_tokens: ids that end a row.
        repeats: runs to take the median of.

    Returns:
        The tokens int32 [b, max_new_tokens] and their counts int32 [b], see `decode_loop`, and the seconds of the loop.
    """
    keys, stop = jax.random.split(jax.random.key(0), first.shape[0]), jnp.asarray(stop_tokens, jnp.int32)
    options = {"sampling": Sampling(), "max_new_tokens": max_new_tokens, "implementation": "auto"}
    run, times = None, []
    for _ in range(repeats):
        cache = jax.block_until_ready(make_cache())
        run = run or decode_loop.lower(decoder, first, cache, keys, stop, **options).compile()
        started = time.perf_counter()
        out, count, _ = jax.block_until_ready(run(decoder, first, cache, keys, stop))
        times.append(time.perf_counter() - started)
    return out, count, statistics.median(times)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    step: jax.Array
    token: jax.Array
    done: jax.Array
    out: jax.Array
    count: jax.Array
    cache: tq.Cache


def _first(decoder: Decoder, hidden: jax.Array, lengths: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """The first new token of each row, int32 [b], from the hidden state of its last one."""
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return sample(decoder.logits(last)[:, 0], _at(keys, jnp.int32(0)), sampling)


def _at(keys: jax.Array, step: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)


def _check(
    decoder: Decoder,
    tokens: Any,
    lengths: Any,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
) -> None:
    config = decoder.config
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens: expected integers [b, t], neither empty, got {tokens.dtype} {tokens.shape}")
    if lengths.shape != tokens.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths: expected integers [{tokens.shape[0]}], got {lengths.dtype} {lengths.shape}")
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths: expected prompts of 1 to {tokens.shape[1]} tokens, got {lengths.tolist()}")
    for name, ids in (("tokens", tokens), ("stop_tokens", np.array(stop_tokens, np.int64))):
        if ids.size and (ids.min() < 0 or ids.max() >= config.vocab_size):
            raise ValueError(f"{name}: expected ids in [0, {config.vocab_size}), got {ids.min()} to {ids.max()}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")


def _check_room(decoder: Decoder, lengths: Any, max_tokens: int, cache: tq.Cache | None, max_new_tokens: int) -> None:
    prompt = np.asarray(lengths)
    if cache is not None:
        _check_cache(decoder, cache, prompt.size)
    before = np.zeros_like(prompt) if cache is None else np.asarray(cache.length)[: prompt.size]
    longest = int(np.argmax(before + prompt))
    needed = int((before + prompt)[longest]) + max_new_tokens - 1
    parts = f"prompt {prompt[longest]} + {max_new_tokens} new - 1"
    if cache is not None:
        parts = f"{before[longest]} in the cache + {parts}"
    limit = "cache_spec.max_tokens" if cache is None else "cache.spec.max_tokens"
    for name, room in ((limit, max_tokens), ("the model's context", decoder.config.max_context)):
        if needed > room:
            raise ValueError(f"{name}: expected room for {needed} tokens ({parts}), got {room}")


def _check_cache(decoder: Decoder, cache: tq.Cache, batch: int) -> None:
    decoder.require_rows(cache, batch=batch)
    config, spec = decoder.config, cache.spec
    wanted, found = (config.num_kv_heads, config.head_dim), (spec.num_kv_heads, spec.head_dim)
    if found != wanted:
        raise ValueError(f"cache.spec (num_kv_heads, head_dim): expected {wanted}, got {found}")
    if np.any(cache.overflow):
        full = np.flatnonzero(cache.overflow).tolist()
        raise ValueError(f"cache: expected rows that hold all their tokens, got overflow in rows {full}")
    layers = np.asarray(cache.length).reshape(config.num_layers, batch)
    if np.any(layers != layers[0]):
        raise ValueError(f"cache: expected as many tokens in all layers of a sequence, got {layers.tolist()}")
