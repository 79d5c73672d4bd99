"""Exact causal attention over one chunk, as the model layers call it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.chunk import BLOCK, attend_chunk, attend_only, attend_prompt
from pallas_kernels.attention.options import LogitOptions
from tq_jax.paged import finish


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: jax.Array | None = None,
    only: jax.Array | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Softmax attention of every token over itself and the tokens before it.

    Right-padded batches need no mask: padding comes after every valid token, so no valid query sees it. On a GPU cuDNN
    attends, for the types and head dims that it has; elsewhere blocks of queries go over blocks of keys.

    Args:
        query: [b, t, h_q, d], queries after rotary embedding; [b, 1, h_q, d] with `only`.
        key: [b, t, h_kv, d], keys after rotary embedding; h_kv divides h_q.
        value: [b, t, h_kv, d], values.
        scale: Factor on the scores; None means 1 / sqrt(d).
        window: A query sees itself and the window - 1 tokens before it; None means all tokens before it.
        softcap: Scores x become softcap * tanh(x / softcap).
        sink_logits: [h_q], a learned logit per head that takes part in the softmax and has no value.
        only: int32 [b], the place of each sequence's one query; None for a query per token.
        block: Tokens per block of queries and per block of keys where cuDNN does not attend.

    Returns:
        Mixed values, of the shape and dtype of `query`; accumulated in float32.

    Raises:
        ValueError: If the shapes contradict each other, or the window is not positive.
    """
    _check(query, key, value, window, single=only is not None)
    options = LogitOptions.for_head_dim(query.shape[3], scale=scale, softcap=softcap, sliding_window=window)
    if only is None and sink_logits is None:
        return attend_prompt(query, key, value, options=options, block=block)
    if only is None:
        found = attend_chunk(query, key, value, options=options, block=block)
    else:
        found = attend_only(query, key, value, only, options=options)
    if sink_logits is None:
        return (found.acc / found.total[..., None]).astype(query.dtype)
    return finish(found, sink_logits, jnp.ones(query.shape[:2], bool)).astype(query.dtype)


def _check(query: jax.Array, key: jax.Array, value: jax.Array, window: int | None, *, single: bool) -> None:
    """Refuse shapes and windows that do not fit."""
    b, t, h_q, d = query.shape
    if single:
        if t != 1:
            raise ValueError(f"query: expected one token per sequence with only, got {t}")
        t = key.shape[1]
    h_kv = key.shape[2]
    if key.shape != (b, t, h_kv, d) or value.shape != key.shape:
        raise ValueError(f"key and value: expected [{b}, {t}, h_kv, {d}], got {key.shape} and {value.shape}")
    if h_q % h_kv:
        raise ValueError(f"query heads: expected a multiple of {h_kv} key heads, got {h_q}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
