"""Answers that a model writes from a cache, and how far each step is from full precision."""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import tq_jax as tq
from tq_jax.commands.eval.schemes import Candidate, Packed, Rounded
from tq_jax.commands.rivals.calibrated import compiled_with
from tq_jax.commands.tasks.rows import RivalRows, calibrate, empty_rows, extend_rows, fill_rows
from tq_jax.models import Decoder


@runtime_checkable
class Steps(Protocol):
    """A way to decode several sequences; hashable, static in compiled functions."""

    def empty(self, decoder: Decoder, tokens: Int[Array, "b t"], lengths: Int[Array, "b"]) -> Any:
        """A cache without tokens for sequences that will begin with these prompts."""
        ...

    def begin(
        self, decoder: Decoder, tokens: Int[Array, "b t"], lengths: Int[Array, "b"], cache: Any
    ) -> tuple[Float[Array, "b vocab"], Any]:
        """Runs right-padded prompts: logits of the next tokens, and the cache."""
        ...

    def step(
        self, decoder: Decoder, token: Int[Array, "b"], active: Int[Array, "b"], cache: Any
    ) -> tuple[Float[Array, "b vocab"], Any]:
        """Appends a token to each sequence whose `active` is 1: logits of the next tokens, and the cache."""
        ...


@dataclasses.dataclass(frozen=True)
class PackedSteps:
    """Decoding from a real, packed cache.

    Attributes:
        spec: Spec of a layer's cache.
    """

    spec: tq.CacheSpec

    def empty(self, decoder: Decoder, tokens: Array, lengths: Array) -> Any:
        """A cache without tokens; see `Steps`."""
        return decoder.init_cache(self.spec, batch=tokens.shape[0])

    def begin(self, decoder: Decoder, tokens: Array, lengths: Array, cache: Any) -> tuple[Array, Any]:
        """Runs prompts; see `Steps`."""
        hidden, cache = decoder.prefill(tokens, cache, lengths=lengths, last_only=True)
        return decoder.logits(hidden)[:, 0], cache

    def step(self, decoder: Decoder, token: Array, active: Array, cache: Any) -> tuple[Array, Any]:
        """Appends a token; see `Steps`."""
        hidden, cache = decoder.extend(token[:, None], cache, lengths=active)
        return decoder.logits(hidden)[:, 0], cache


@dataclasses.dataclass(frozen=True)
class RivalSteps:
    """Decoding from a rival's codes.

    Attributes:
        rounded: The rival, and which tokens stay in full precision. No part of the equality: one compiled function
            serves all rivals of this package.
        rivals: Every rival that the function serves.
    """

    rounded: Rounded = dataclasses.field(compare=False)
    rivals: tuple[Any, ...]

    def empty(self, decoder: Decoder, tokens: Array, lengths: Array) -> RivalRows:
        """A cache without tokens, and a calibration on the prompts if the rival needs one; see `Steps`."""
        rounded = self.rounded
        rows = empty_rows(
            decoder, rounded.rival, batch=tokens.shape[0], max_tokens=rounded.max_tokens, window=rounded.window,
            sinks=rounded.sinks,
        )  # fmt: skip
        return calibrate(decoder, rounded.rival, rows, tokens, lengths)

    def begin(self, decoder: Decoder, tokens: Array, lengths: Array, cache: RivalRows) -> tuple[Array, RivalRows]:
        """Runs prompts; see `Steps`."""
        return fill_rows(decoder, tokens, lengths, cache)

    def step(self, decoder: Decoder, token: Array, active: Array, cache: RivalRows) -> tuple[Array, RivalRows]:
        """Appends a token; see `Steps`."""
        return extend_rows(decoder, token, active, cache)


def steps_of(candidate: Candidate) -> Steps:
    """How a candidate of `tq-jax eval` decodes.

    Raises:
        TypeError: If the candidate is neither a packed cache nor a rival.
    """
    if isinstance(candidate, Packed):
        return PackedSteps(candidate.scheme.cache)
    if isinstance(candidate, Rounded):
        return RivalSteps(candidate, compiled_with(candidate.rival))
    raise TypeError(f"expected Packed or Rounded, got {type(candidate).__name__}")


class _Writing(NamedTuple):
    index: Array
    token: Array
    done: Array
    out: Array
    cache: Any


@functools.partial(jax.jit, static_argnames=("steps", "most"), donate_argnames="cache")
def write_answers(
    decoder: Decoder,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    stop: Int[Array, "s"],
    cache: Any,
    *,
    steps: Steps,
    most: int,
) -> tuple[Int[Array, "b most"], Any]:
    """Greedy answers.

    Args:
        decoder: The model.
        tokens: Right-padded prompts.
        lengths: Tokens of each prompt.
        stop: Token ids that end an answer.
        cache: Empty cache; donated.
        steps: How sequences decode.
        most: Most tokens of an answer.

    Returns:
        The tokens of each answer, its stop token included, and -1 after them; the cache, so that its memory is reused.
    """
    logits, cache = steps.begin(decoder, tokens, lengths, cache)

    def put(state: _Writing, logits: Array) -> _Writing:
        drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        out = state.out.at[:, state.index].set(jnp.where(state.done, -1, drawn))
        done = state.done | jnp.any(drawn[:, None] == stop[None, :], axis=1)
        return _Writing(state.index + 1, drawn, done, out, state.cache)

    def advance(state: _Writing) -> _Writing:
        logits, cache = steps.step(decoder, state.token, (~state.done).astype(jnp.int32), state.cache)
        return put(state._replace(cache=cache), logits)

    batch = tokens.shape[0]
    nothing = jnp.full((batch, most), -1, jnp.int32)
    first = _Writing(jnp.int32(0), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), nothing, cache)
    end = lax.while_loop(lambda s: (s.index < most) & ~jnp.all(s.done), advance, put(first, logits))
    return end.out, end.cache


@functools.partial(jax.jit, static_argnames=("steps", "exact"), donate_argnames=("cache", "full"))
def step_divergence(
    decoder: Decoder,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    answers: Int[Array, "b n"],
    cache: Any,
    full: Any,
    *,
    steps: Steps,
    exact: Steps,
) -> tuple[Float[Array, "b n"], Any]:
    """KL(full || cache) at each step of answers that are given: does a cache's error add up as it decodes?

    Args:
        decoder: The model.
        tokens: Right-padded prompts.
        lengths: Tokens of each prompt.
        answers: Tokens of each answer, -1 after them.
        cache: Empty cache that is studied; donated.
        full: Empty cache in full precision; donated.
        steps: How sequences decode from the cache that is studied.
        exact: How they decode in full precision.

    Returns:
        Divergences in nats, NaN after an answer; the first is that of the prompt, over which attention is exact. And
        the two caches, so that their memory is reused.
    """
    both = steps.begin(decoder, tokens, lengths, cache), exact.begin(decoder, tokens, lengths, full)

    def advance(state: Any, token: Array) -> tuple[Any, Array]:
        (logits, cache), (expected, full) = state
        active = (token >= 0).astype(jnp.int32)
        right, found = jax.nn.log_softmax(expected), jax.nn.log_softmax(logits)
        divergence = jnp.sum(jnp.exp(right) * (right - found), axis=-1)
        token = jnp.maximum(token, 0)
        state = steps.step(decoder, token, active, cache), exact.step(decoder, token, active, full)
        return state, jnp.where(active > 0, divergence, jnp.nan)

    ((_, cache), (_, full)), found = lax.scan(advance, both, answers.T)
    return found.T, (cache, full)
