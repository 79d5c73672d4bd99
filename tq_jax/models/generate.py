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
from pallas_kernels.pytree import pytree
from tq_jax.attention import Implementation
from tq_jax.models.checks import check_request, require_key
from tq_jax.models.decoder import Decoder
from tq_jax.models.layer_caches import Caches
from tq_jax.models.mesh_step import run_step
from tq_jax.models.prompt import draw_first, keys_at, run_in_chunks
from tq_jax.models.sampling import Sampling, sample
from tq_jax.models.sharding import AXES, Layout, MeshAxes, cache_shardings, init_cache, place, shard

PROMPT_CHUNK = 32768
"""Most tokens of a prompt that run at once: 5 GB of activations of a decoder of the size of Llama 3.1 8B."""


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
        tokens: int32 [b, max_new_tokens], new tokens of each sequence; -1 after its stop token.
        lengths: int32 [b], number of new tokens of each sequence, its stop token included.
        cache: Cache of `num_layers * b` rows. It holds the prompts and all new tokens except the last of each sequence.
            On a mesh with a sequence axis of n devices it has n times as many rows, see `sharding.init_cache`.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: Caches

    def sequences(self) -> list[list[int]]:
        """The new tokens of each sequence, without padding."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """Right-pad lists of tokens to one array.

    The padded length is rounded up by at most 15 tokens or a quarter, so that prompts of similar lengths share a
    compiled prefill.

    Args:
        prompts: Token ids of each sequence, at least one per sequence.

    Returns:
        The padded tokens, int32 [b, t], and the number of valid tokens of each sequence, int32 [b].

    Raises:
        ValueError: If there are no prompts, or if one of them is empty.

    Example:
        >>> tokens, lengths = pad_prompts([[5, 6, 7], [8]])
        >>> tokens.shape, lengths.tolist()
        ((2, 16), [3, 1])
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not all(lengths):
        raise ValueError(f"prompts: expected at least one, each of at least one token, got lengths {lengths}")
    tokens = np.zeros((len(prompts), padded_length(max(lengths))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


def padded_length(longest: int) -> int:
    """The length to which `pad_prompts` pads prompts.

    Args:
        longest: Tokens of the longest prompt.

    Returns:
        The length, rounded up by at most 15 tokens or a quarter.
    """
    step = max(16, 1 << max(longest.bit_length() - 3, 0))
    return -(-longest // step) * step


def generate(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    cache_spec: tq.CacheSpec | None = None,
    cache: Caches | None = None,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    key: jax.Array | None = None,
    prompt_chunk: int = PROMPT_CHUNK,
    implementation: Implementation = "auto",
    precise: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    axes: MeshAxes = AXES,
) -> Generation:
    """Continue a batch of prompts, from an empty cache or after the tokens of a given one.

    If no cache is given, the prompts run with exact attention, their keys and values go to a new cache, and every new
    token attends over it. If a cache is given, the tokens of the prompts attend over the cache as well. Longer prompts
    than `prompt_chunk` run chunk by chunk, so that memory is bounded: tokens attend exactly over their own chunk, and
    over what the cache holds of those before it.

    Args:
        decoder: From `load_model` or `Decoder`.
        tokens: int32 [b, t], right-padded prompts, see `pad_prompts`.
        lengths: int32 [b], tokens of each prompt, 1 to t.
        cache_spec: Spec of the cache of one layer. Give either `cache_spec` or `cache`.
        cache: Tokens before the prompts: the cache of an earlier `Generation` or from `tq_jax.load_cache`. It does not
            hold the last token of that generation, so the prompt begins with that token. The cache is copied, not
            changed; `tq_jax.resize` makes room for more tokens.
        max_new_tokens: Largest number of new tokens per sequence.
        sampling: How tokens are drawn; None is greedy.
        stop_tokens: Ids that end a sequence; `decoder.config.stop_tokens` for a chat.
        key: Random key; required unless sampling is greedy. The same key draws the same tokens.
        prompt_chunk: Most tokens of a prompt that run at once.
        implementation: Implementation of attention, see `tq_jax.attend`.
        precise: Whether attention is precise, see `tq_jax.attend`.
        mesh: Devices that compute together: KV heads are spread over its axis "heads", the tokens of the cache over its
            axis "sequence" (see docs/devices.md). `sharding.shard` places the decoder once for many calls. A given
            cache was made with as many devices of "sequence". None for one device.
        axes: Other names of the mesh's axes.

    Returns:
        The new tokens and the cache. The loop ends as soon as every sequence has stopped.

    Raises:
        ValueError: If the batch or a prompt is empty, prompt_chunk is not positive, ids are outside the vocabulary, a
            prompt with its continuation exceeds the cache or the model's context, sampling lacks a key, not exactly one
            of `cache_spec` and `cache` is given, or the cache is of another model or batch or has overflowed.
        NotImplementedError: If the decoder cannot be spread over the mesh, see `sharding.Layout.require`.

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
    if prompt_chunk < 1:
        raise ValueError(f"prompt_chunk: expected at least 1 token, got {prompt_chunk}")
    layout = None if mesh is None else Layout(mesh, axes)
    decoder = decoder if mesh is None else shard(decoder, mesh, axes=axes)
    spec = check_request(
        decoder, tokens, lengths, cache_spec, cache, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens,
        shares=1 if layout is None else layout.shares,
    )  # fmt: skip
    keys = _sequence_keys(key, sampling, np.shape(tokens)[0])
    stop = jnp.asarray(np.array(stop_tokens, np.int32))
    prompts = {"tokens": jnp.asarray(tokens, jnp.int32), "lengths": jnp.asarray(lengths, jnp.int32), "keys": keys}
    how: dict[str, Any] = {"sampling": sampling, "implementation": implementation, "precise": precise}
    start = _start_cache(decoder, spec, cache, layout, batch=np.shape(tokens)[0])
    first, filled = _run_prompts(decoder, start, layout, prompts, prompt_chunk, cache is not None, **how)
    arrays, how = {"first": first, "keys": keys, "stop": stop}, {**how, "max_new_tokens": max_new_tokens}
    out, count, filled = run_step(decode_loop, decoder, layout, cache=filled, arrays=arrays, options=how)
    return Generation(tokens=out, lengths=count, cache=filled)


def _run_prompts(
    decoder: Decoder,
    start: Caches,
    layout: Layout | None,
    prompts: dict[str, Any],
    chunk: int,
    given: bool,
    **how: Any,
) -> tuple[Any, ...]:
    """The first new token of each sequence, and the cache that holds the prompts; a given cache is not changed."""
    if prompts["tokens"].shape[1] > chunk:
        start = jax.tree.map(jnp.copy, start) if given else start
        return run_in_chunks(decoder, cache=start, chunk=chunk, layout=layout, **prompts, **how)
    if given:
        return run_step(extend_step, decoder, layout, cache=start, arrays=prompts, options=how, donate=False)
    return run_step(prefill_step, decoder, layout, cache=start, arrays=prompts, options={"sampling": how["sampling"]})


def _start_cache(
    decoder: Decoder, spec: tq.CacheSpec, cache: Caches | None, layout: Layout | None, *, batch: int
) -> Caches:
    """The given cache or an empty one, on the devices of a mesh if there is one."""
    if layout is None:
        return decoder.init_cache(spec, batch=batch) if cache is None else cache
    where: dict[str, Any] = {"mesh": layout.mesh, "axes": layout.axes}
    if cache is None:
        return init_cache(decoder, spec, batch=batch, **where)
    return jax.tree.map(place, cache, cache_shardings(cache, **where))


@partial(jax.jit, static_argnames=("sampling",), donate_argnames=("cache",))
def prefill_step(
    decoder: Decoder, tokens: jax.Array, lengths: jax.Array, cache: Caches, keys: jax.Array, *, sampling: Sampling
) -> tuple[jax.Array, Caches]:
    """Run prompts over an empty cache and draw the first new token of each sequence.

    Args:
        decoder: The decoder.
        tokens: int32 [b, t], right-padded prompts.
        lengths: int32 [b], tokens of each prompt.
        cache: Empty cache of `num_layers * b` rows; donated.
        keys: Random keys [b], one per sequence.
        sampling: How tokens are drawn.

    Returns:
        The first new tokens, int32 [b], and the filled cache.
    """
    last, cache = decoder.prefill(tokens, cache, lengths=lengths, last_only=True)
    return draw_first(decoder, last, keys, sampling=sampling), cache


@partial(jax.jit, static_argnames=("sampling", "implementation", "precise"))
def extend_step(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Caches,
    keys: jax.Array,
    *,
    sampling: Sampling,
    implementation: Implementation,
    precise: bool,
) -> tuple[jax.Array, Caches]:
    """Run prompts after the tokens of a cache and draw the first new token of each sequence.

    Args:
        decoder: The decoder.
        tokens: int32 [b, t], right-padded prompts.
        lengths: int32 [b], tokens of each prompt.
        cache: Cache of `num_layers * b` rows; copied, not changed.
        keys: Random keys [b], one per sequence.
        sampling: How tokens are drawn.
        implementation: Implementation of attention, see `tq_jax.attend`.
        precise: Whether attention is precise, see `tq_jax.attend`.

    Returns:
        The first new tokens, int32 [b], and the filled cache.
    """
    how: dict[str, Any] = {"implementation": implementation, "precise": precise, "last_only": True}
    last, cache = decoder.extend(tokens, cache, lengths=lengths, **how)
    return draw_first(decoder, last, keys, sampling=sampling), cache


@partial(
    jax.jit, static_argnames=("sampling", "max_new_tokens", "implementation", "precise"), donate_argnames=("cache",)
)
def decode_loop(
    decoder: Decoder,
    first: jax.Array,
    cache: Caches,
    keys: jax.Array,
    stop: jax.Array,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    implementation: Implementation,
    precise: bool = False,
) -> tuple[jax.Array, jax.Array, Caches]:
    """Draw tokens until every sequence has stopped.

    Args:
        decoder: The decoder.
        first: int32 [b], the first new token of each sequence, from `prefill_step` or `extend_step`.
        cache: Cache of `num_layers * b` rows that holds the prompts; donated.
        keys: Random keys [b], one per sequence.
        stop: int32 [s], token ids that end a sequence.
        sampling: How tokens are drawn.
        max_new_tokens: Largest number of new tokens per sequence, the first included.
        implementation: Implementation of attention, see `tq_jax.attend`.
        precise: Whether attention is precise, see `tq_jax.attend`.

    Returns:
        The new tokens int32 [b, max_new_tokens] (-1 after a stop token), their numbers int32 [b], and the cache.
    """

    def stops(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == stop[None, :], axis=1)

    def alive(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        # A sequence that has stopped appends nothing and keeps its last token.
        hidden, cache = decoder.extend(
            state.token[:, None],
            state.cache,
            lengths=(~state.done).astype(jnp.int32),
            implementation=implementation,
            precise=precise,
        )
        drawn = sample(decoder.logits(hidden)[:, 0], keys_at(keys, state.step), sampling)
        token = jnp.where(state.done, state.token, drawn)
        return _State(
            step=state.step + 1,
            token=token,
            done=state.done | stops(token),
            out=state.out.at[:, state.step].set(jnp.where(state.done, -1, drawn)),
            count=state.count + (~state.done).astype(jnp.int32),
            cache=cache,
        )

    end = lax.while_loop(alive, advance, _start(first, stops(first), cache, max_new_tokens))
    return end.out, end.count, end.cache


def time_decode(
    decoder: Decoder,
    first: jax.Array,
    make_cache: Callable[[], Caches],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    repeats: int = 1,
) -> tuple[jax.Array, jax.Array, float]:
    """Decode greedily by the compiled loop and time it, compilation excluded.

    Args:
        decoder: From `load_model` or `Decoder`.
        first: int32 [b], the first new token of each sequence.
        make_cache: Makes the cache that holds the prompts; called once per run, because a run consumes its cache.
        max_new_tokens: Largest number of new tokens per sequence, the first included.
        stop_tokens: Ids that end a sequence.
        repeats: Number of runs.

    Returns:
        The new tokens int32 [b, max_new_tokens] (-1 after a stop token), their numbers int32 [b], and the median time
        of the loop in seconds.
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


@pytree
class _State:
    """State of the loop of decode steps.

    Attributes:
        step: int32 [], new tokens per sequence so far.
        token: int32 [b], the latest token of each sequence, not yet in the cache.
        done: bool [b], whether each sequence has stopped.
        out: int32 [b, max_new_tokens], the new tokens, -1 where there is none.
        count: int32 [b], number of new tokens of each sequence.
        cache: The cache.
    """

    step: jax.Array
    token: jax.Array
    done: jax.Array
    out: jax.Array
    count: jax.Array
    cache: Caches


def _start(first: jax.Array, done: jax.Array, cache: Caches, max_new_tokens: int) -> _State:
    """The state after the first new token of each sequence."""
    batch = first.shape[0]
    return _State(
        step=jnp.int32(1),
        token=first,
        done=done,
        out=jnp.full((batch, max_new_tokens), -1, jnp.int32).at[:, 0].set(first),
        count=jnp.ones(batch, jnp.int32),
        cache=cache,
    )


def _sequence_keys(key: jax.Array | None, sampling: Sampling, batch: int) -> jax.Array:
    """Random keys [batch], one per sequence."""
    key = require_key(key, sampling)
    return jax.vmap(lambda sequence: jax.random.fold_in(key, sequence))(jnp.arange(batch))
