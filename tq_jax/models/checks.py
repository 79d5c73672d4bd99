"""Checks of the arguments of `generate` and `generate_many`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

import tq_jax as tq
from tq_jax.models.config import DecoderConfig
from tq_jax.models.decoder import Decoder
from tq_jax.models.layer_caches import Caches
from tq_jax.models.sampling import Sampling


def check_request(
    decoder: Decoder,
    tokens: Any,
    lengths: Any,
    cache_spec: tq.CacheSpec | None,
    cache: Caches | None,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    shares: int = 1,
) -> tq.CacheSpec:
    """Check the arguments of `generate`.

    Args:
        decoder: The decoder.
        tokens: int32 [b, t], right-padded prompts.
        lengths: int32 [b], tokens of each prompt.
        cache_spec: Spec of the cache of one layer; None if a cache is given.
        cache: Tokens before the prompts; None if a spec is given.
        max_new_tokens: Largest number of new tokens per sequence.
        stop_tokens: Ids that end a sequence.
        shares: Devices over which the tokens of each sequence are spread; the cache has rows for each of them.

    Returns:
        The spec of the cache of one layer: `cache_spec`, or that of `cache`.

    Raises:
        ValueError: If the arguments contradict each other, see `generate`.
    """
    if (cache_spec is None) == (cache is None):
        raise ValueError(f"expected one of cache_spec and cache, got {'neither' if cache is None else 'both'}")
    spec = cache.spec if cache is not None else cache_spec
    assert spec is not None
    _check_prompts(decoder, tokens, lengths, max_new_tokens, stop_tokens)
    _check_room(decoder, lengths, spec.max_tokens, cache, max_new_tokens, shares)
    return spec


def require_key(key: jax.Array | None, sampling: Sampling) -> jax.Array:
    """The random key of a generation; greedy ones need none.

    Raises:
        ValueError: If there is no key, and sampling is not greedy.
    """
    if key is None and sampling.temperature:
        raise ValueError(f"key: expected a random key to sample at temperature {sampling.temperature}, got None")
    return jax.random.key(0) if key is None else key


def require_positive(**numbers: int) -> None:
    """Check numbers by their names.

    Raises:
        ValueError: If one of them is less than 1.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")


def require_ids(name: str, ids: np.ndarray, config: DecoderConfig) -> None:
    """Check the token ids of prompts.

    Args:
        name: The argument, for messages.
        ids: Integers, at least one.
        config: Config of the decoder.

    Raises:
        ValueError: If an id is outside the vocabulary.
    """
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"{name}: expected ids in [0, {config.vocab_size}), got {ids.min()} to {ids.max()}")


def require_stop_tokens(stop_tokens: Sequence[int], config: DecoderConfig) -> None:
    """Check the ids that end a sequence.

    Args:
        stop_tokens: The ids; there may be none.
        config: Config of the decoder.

    Raises:
        ValueError: If an id is outside the vocabulary.
    """
    wrong = [token for token in stop_tokens if not 0 <= token < config.vocab_size]
    if wrong:
        raise ValueError(f"stop_tokens: expected ids in [0, {config.vocab_size}), got {wrong}")


def _check_prompts(
    decoder: Decoder, tokens: Any, lengths: Any, max_new_tokens: int, stop_tokens: Sequence[int]
) -> None:
    """Check shapes, lengths and ids."""
    config = decoder.config
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens: expected integers [b, t] with b and t at least 1, got {tokens.dtype} {tokens.shape}")
    if lengths.shape != tokens.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths: expected integers [{tokens.shape[0]}], got {lengths.dtype} {lengths.shape}")
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths: expected prompts of 1 to {tokens.shape[1]} tokens, got {lengths.tolist()}")
    require_ids("tokens", tokens, config)
    require_stop_tokens(stop_tokens, config)
    require_positive(max_new_tokens=max_new_tokens)


def _check_room(
    decoder: Decoder, lengths: Any, max_tokens: int, cache: Caches | None, max_new_tokens: int, shares: int
) -> None:
    """Check that the prompts and the new tokens fit into the cache and the model's context."""
    prompt = np.asarray(lengths)
    before = np.zeros_like(prompt)
    if cache is not None:
        before, max_tokens = _check_cache(decoder, cache, prompt.size, shares), max_tokens * shares
    longest = int(np.argmax(before + prompt))
    needed = int((before + prompt)[longest]) + max_new_tokens - 1
    parts = f"prompt {prompt[longest]} + {max_new_tokens} new - 1"
    if cache is not None:
        parts = f"{before[longest]} in the cache + {parts}"
    limit = "cache_spec.max_tokens" if cache is None else "cache.spec.max_tokens"
    for name, room in ((limit, max_tokens), ("the model's context", decoder.config.max_context)):
        if needed > room:
            raise ValueError(f"{name}: expected room for {needed} tokens ({parts}), got {room}")


def _check_cache(decoder: Decoder, cache: Caches, batch: int, shares: int) -> np.ndarray:
    """The tokens of each sequence, after a check that a cache fits the decoder and the batch, and holds all of them."""
    decoder.require_rows(cache, batch=batch * shares)
    config, spec = decoder.config, cache.spec
    wanted, found = (config.num_kv_heads, config.head_dim), (spec.num_kv_heads, spec.head_dim)
    if found != wanted:
        raise ValueError(f"cache.spec (num_kv_heads, head_dim): expected {wanted}, got {found}")
    overflow = _whole(cache.overflow)
    if np.any(overflow):
        full = np.flatnonzero(overflow).tolist()
        raise ValueError(f"cache: expected rows that hold all their tokens, got overflow in rows {full}")
    layers = _whole(cache.length).reshape(shares, config.num_layers, batch).sum(0)
    if np.any(layers != layers[0]):
        raise ValueError(f"cache: expected equal numbers of tokens in all layers of a sequence, got {layers.tolist()}")
    return layers[0]


def _whole(array: Any) -> np.ndarray:
    """An array on this host, also if other hosts hold parts of it; then all of them call this."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(process_allgather(array, tiled=True))
