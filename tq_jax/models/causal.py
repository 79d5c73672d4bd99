"""Exact causal attention over one chunk, block by block, without a [t, t] matrix of scores."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import HIDDEN


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    block: int = 256,
) -> jax.Array:
    """Softmax attention of every token over itself and the tokens before it.

    Right-padded batches need no mask: padding comes after every valid token, so no valid query sees it. On a GPU cuDNN
    attends, for the types and head dims that it has. Elsewhere a block of queries skips the blocks of keys that none of
    its queries sees, and a running maximum and a running sum replace the full softmax (online softmax,
    arXiv:1805.02867).

    Args:
        query: [b, t, h_q, d], queries after rotary embedding.
        key: [b, t, h_kv, d], keys after rotary embedding; h_kv divides h_q.
        value: [b, t, h_kv, d], values.
        scale: Factor on the scores; None means 1 / sqrt(d).
        window: A query sees itself and the window - 1 tokens before it; None means all tokens before it.
        block: Tokens per block of queries and per block of keys.

    Returns:
        [b, t, h_q, d], mixed values in the dtype of `query`; accumulated in float32.

    Raises:
        ValueError: If the shapes contradict each other, or the window is not positive.
    """
    _check(query, key, value, window)
    b, t, h_q, d = query.shape
    h_kv = key.shape[2]
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    if jax.default_backend() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16) and d <= 128 and d % 8 == 0:
        reach = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=True, local_window_size=reach, implementation="cudnn"
        )
    block = min(block, t)
    blocks = -(-t // block)
    pad = ((0, 0), (0, blocks * block - t), (0, 0), (0, 0))
    grouped = jnp.pad(query, pad).reshape(b, blocks, block, h_kv, h_q // h_kv, d)
    key, value = jnp.pad(key, pad), jnp.pad(value, pad)

    def query_block(_: None, index: jax.Array) -> tuple[None, jax.Array]:
        q = lax.dynamic_index_in_dim(grouped, index, axis=1, keepdims=False)  # [b, block, h_kv, g, d]

        def key_block(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
            k, v = (lax.dynamic_slice_in_dim(x, j * block, block, axis=1) for x in (key, value))
            starts = {"query_start": index * block, "key_start": j * block}
            return _fold(state, q, k, v, scale=scale, window=window, **starts)

        first = 0 if window is None else jnp.maximum(index * block - (window - 1), 0) // block
        acc, _, total = lax.fori_loop(first, index + 1, key_block, _empty(q))
        return None, (acc / total[..., None]).astype(query.dtype)

    _, out = lax.scan(query_block, None, jnp.arange(blocks))  # [blocks, b, h_kv, g, block, d]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(b, blocks * block, h_q, d)
    return out[:, :t]


def _empty(q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state of `_fold` for a block of queries [b, s, h_kv, g, d] before its first block of keys."""
    b, block, h_kv, group, d = q.shape
    rows = (b, h_kv, group, block)
    return jnp.zeros((*rows, d), jnp.float32), jnp.full(rows, HIDDEN, jnp.float32), jnp.zeros(rows, jnp.float32)


def _fold(
    state: tuple[jax.Array, jax.Array, jax.Array],
    q: jax.Array,  # [b, s, h_kv, g, d]
    k: jax.Array,  # [b, u, h_kv, d]
    v: jax.Array,  # [b, u, h_kv, d]
    *,
    scale: float,
    window: int | None,
    query_start: jax.Array,
    key_start: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fold a block of keys and values into the running sums of a block of queries.

    The state holds the mixed values [b, h_kv, g, s, d] before normalization, and the maximum and the sum of the softmax
    [b, h_kv, g, s]. `query_start` and `key_start` are the positions of the first tokens of the two blocks.
    """
    acc, peak, total = state
    scores = jnp.einsum("bshgd,buhd->bhgsu", q, k, preferred_element_type=jnp.float32) * jnp.float32(scale)
    q_pos, k_pos = query_start + jnp.arange(q.shape[1]), key_start + jnp.arange(k.shape[1])
    age = q_pos[:, None] - k_pos[None, :]
    visible = age >= 0 if window is None else (age >= 0) & (age < window)
    scores = jnp.where(visible[None, None, None], scores, jnp.float32(HIDDEN))
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    weight, shrink = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
    mixed = jnp.einsum("bhgsu,buhd->bhgsd", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return acc * shrink[..., None] + mixed, new_peak, total * shrink + weight.sum(axis=-1)


def _check(query: jax.Array, key: jax.Array, value: jax.Array, window: int | None) -> None:
    """Refuse shapes and windows that do not fit."""
    b, t, h_q, d = query.shape
    h_kv = key.shape[2]
    if key.shape != (b, t, h_kv, d) or value.shape != key.shape:
        raise ValueError(f"key and value: expected [{b}, {t}, h_kv, {d}], got {key.shape} and {value.shape}")
    if h_q % h_kv:
        raise ValueError(f"query heads: expected a multiple of {h_kv} key heads, got {h_q}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
