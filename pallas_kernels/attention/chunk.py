"""Exact causal attention of a chunk of tokens over itself, without a [t, t] matrix of scores.

Right-padded batches need no mask: padding comes after every valid token, so no valid query sees it.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import chunk_triton
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial
from pallas_kernels.attention.reference import attend_tokens
from pallas_kernels.compat import cudnn
from pallas_kernels.dispatch import Implementation, choose, interprets
from pallas_kernels.numerics import HIDDEN

BLOCK = 256
"""Tokens per block of queries and per block of keys of the reference."""


def attend_chunk(
    query: Float[Array, "b t h_q d"],
    key: Float[Array, "b t h_kv d"],
    value: Float[Array, "b t h_kv d"],
    *,
    options: LogitOptions,
    implementation: Implementation = "auto",
    block: int = BLOCK,
) -> Partial:
    """Attention of every token over itself and the tokens before it, to be merged with that over other tokens.

    Args:
        query: Queries after rotary embedding.
        key: Keys after rotary embedding, in the type of the queries.
        value: Values.
        options: Logit options.
        implementation: "reference" is jnp; "triton" is a kernel; "auto" is, on a GPU, cuDNN where it takes the case and
            the kernel where it does not.
        block: Tokens per block of the reference.

    Returns:
        The attention, already normalized if cuDNN attends.
    """
    chosen = _chosen(query, options, implementation)
    if chosen != "cudnn":
        return _without_cudnn(chosen, query, key, value, options=options, block=block)
    out, log_sum_exp = cudnn.attend_causal(
        query, key, value, scale=options.scale, sliding_window=options.sliding_window
    )
    return Partial(out.astype(jnp.float32), log_sum_exp, jnp.ones_like(log_sum_exp))


def attend_prompt(
    query: Float[Array, "b t h_q d"],
    key: Float[Array, "b t h_kv d"],
    value: Float[Array, "b t h_kv d"],
    *,
    options: LogitOptions,
    implementation: Implementation = "auto",
    block: int = BLOCK,
) -> Float[Array, "b t h_q d"]:
    """Attention of every token over itself and the tokens before it, where there are no others.

    Args:
        query: As for `attend_chunk`.
        key: As for `attend_chunk`.
        value: As for `attend_chunk`.
        options: Logit options.
        implementation: As for `attend_chunk`.
        block: Tokens per block of the reference.

    Returns:
        Outputs in the type of the queries.
    """
    chosen = _chosen(query, options, implementation)
    if chosen != "cudnn":
        found = _without_cudnn(chosen, query, key, value, options=options, block=block)
        return (found.acc / found.total[..., None]).astype(query.dtype)
    window = options.sliding_window
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=options.scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def attend_only(
    query: Float[Array, "b 1 h_q d"],
    key: Float[Array, "b t h_kv d"],
    value: Float[Array, "b t h_kv d"],
    only: Int[Array, "b"],
    *,
    options: LogitOptions,
) -> Partial:
    """Attention of one token of each chunk over itself and the tokens before it, in float32.

    Args:
        query: The query of that token, after rotary embedding.
        key: Keys of the chunk, after rotary embedding.
        value: Values of the chunk.
        only: The place of the token in its chunk.
        options: Logit options.

    Returns:
        The attention, to be merged with that over other tokens.
    """
    places = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), key.shape[:2])
    return attend_tokens(
        query.astype(jnp.float32),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        positions=only[:, None],
        key_positions=places,
        stored=places <= only[:, None],
        options=options,
    )


def _chosen(
    query: Array, options: LogitOptions, implementation: Implementation
) -> Literal["reference", "triton", "cudnn"]:
    """Which of the three attends; cuDNN wherever it takes the case, unless the kernel is asked for."""
    check = functools.partial(chunk_triton.check_supported, query)
    if implementation == "auto" and not interprets() and cudnn.supports(query, softcap=options.softcap):
        return "cudnn"
    return choose(implementation, op="attention within a prompt", check=check, stacklevel=4)


def _without_cudnn(
    chosen: Literal["reference", "triton"],
    query: Array,
    key: Array,
    value: Array,
    *,
    options: LogitOptions,
    block: int,
) -> Partial:
    if chosen == "triton":
        return chunk_triton.attend_causal(query, key, value, options=options, interpret=interprets())
    return _by_blocks(query, key, value, options=options, block=block)


def _by_blocks(query: Array, key: Array, value: Array, *, options: LogitOptions, block: int) -> Partial:
    """Attends block by block; a block of queries skips the blocks of keys that none of its queries sees.

    A running maximum and a running sum replace the full softmax (online softmax, arXiv:1805.02867).
    """
    b, t, h_q, d = query.shape
    h_kv = key.shape[2]
    block = min(block, t)
    blocks = -(-t // block)
    pad = ((0, 0), (0, blocks * block - t), (0, 0), (0, 0))
    grouped = jnp.pad(query, pad).reshape(b, blocks, block, h_kv, h_q // h_kv, d)
    key, value = jnp.pad(key, pad), jnp.pad(value, pad)
    window = options.sliding_window

    def query_block(_: None, index: Array) -> tuple[None, tuple[Array, Array, Array]]:
        q = lax.dynamic_index_in_dim(grouped, index, axis=1, keepdims=False)  # [b, block, h_kv, g, d]

        def key_block(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            k, v = (lax.dynamic_slice_in_dim(x, j * block, block, axis=1) for x in (key, value))
            return _fold(state, q, k, v, options=options, query_start=index * block, key_start=j * block)

        first = 0 if window is None else jnp.maximum(index * block - (window - 1), 0) // block
        return None, lax.fori_loop(first, index + 1, key_block, _empty(q))

    _, parts = lax.scan(query_block, None, jnp.arange(blocks))  # [blocks, b, h_kv, g, block, ...]

    def in_order(x: Array) -> Array:
        x = jnp.moveaxis(x, (1, 0, 4), (0, 1, 2))  # [b, blocks, block, h_kv, g, ...]
        return x.reshape(b, blocks * block, h_q, *x.shape[5:])[:, :t]

    return Partial(*(in_order(x) for x in parts))


def _empty(q: Array) -> tuple[Array, Array, Array]:
    """The state of `_fold` for a block of queries [b, s, h_kv, g, d] before its first block of keys."""
    b, block, h_kv, group, d = q.shape
    rows = (b, h_kv, group, block)
    return jnp.zeros((*rows, d), jnp.float32), jnp.full(rows, HIDDEN, jnp.float32), jnp.zeros(rows, jnp.float32)


def _fold(
    state: tuple[Array, Array, Array],
    q: Array,  # [b, s, h_kv, g, d]
    k: Array,  # [b, u, h_kv, d]
    v: Array,  # [b, u, h_kv, d]
    *,
    options: LogitOptions,
    query_start: Array,
    key_start: Array,
) -> tuple[Array, Array, Array]:
    """Fold a block of keys and values into the running sums of a block of queries.

    The state holds the mixed values [b, h_kv, g, s, d] before normalization, and the maximum and the sum of the softmax
    [b, h_kv, g, s]. `query_start` and `key_start` are the positions of the first tokens of the two blocks.
    """
    acc, peak, total = state
    scores = jnp.einsum("bshgd,buhd->bhgsu", q, k, precision="highest", preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(options.scale)
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    q_pos, k_pos = query_start + jnp.arange(q.shape[1]), key_start + jnp.arange(k.shape[1])
    age = q_pos[:, None] - k_pos[None, :]
    visible = (age >= 0) if options.sliding_window is None else (age >= 0) & (age < options.sliding_window)
    scores = jnp.where(visible[None, None, None], scores, jnp.float32(HIDDEN))
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    weight, shrink = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
    mixed = jnp.einsum(
        "bhgsu,buhd->bhgsd", weight.astype(v.dtype), v, precision="highest", preferred_element_type=jnp.float32
    )
    return acc * shrink[..., None] + mixed, new_peak, total * shrink + weight.sum(axis=-1)
