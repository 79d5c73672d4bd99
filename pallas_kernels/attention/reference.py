"""Attention over packed pages and over full-precision tokens in obvious jnp, float32: the definition."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.arguments import PagedArguments
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial, merge
from pallas_kernels.format import CodebookFormat
from pallas_kernels.lookup import decode, residual_signs
from pallas_kernels.numerics import HIDDEN
from pallas_kernels.pages import read_pages

TOKENS_PER_STEP = 512
"""Tokens decoded at a time; bounds the float32 copy of keys and values that exists at once."""


def attend_pages(x: PagedArguments) -> Partial:
    """Attention over packed pages; the loop ends with the longest sequence, not with the capacity."""
    page_size, fmt = x.page_size, x.key_format
    step = min(max(1, TOKENS_PER_STEP // page_size), x.block_table.shape[1])
    block_table = jnp.pad(x.block_table, ((0, 0), (0, -x.block_table.shape[1] % step)))

    def attend_step(index: Array, partial: Partial) -> Partial:
        ids = lax.dynamic_slice_in_dim(block_table, index * step, step, axis=1)
        keys, values = read_pages(x.pages, ids)
        token = index * (step * page_size) + jnp.arange(step * page_size, dtype=jnp.int32)[None]
        stored = (token < x.lengths[:, None]).reshape(-1, step, page_size)
        logits = _dot(x.query, decode(keys, fmt))
        if x.sketch_query is not None:
            assert isinstance(fmt, CodebookFormat) and keys.residual is not None
            signs = residual_signs(keys, fmt) * keys.residual.astype(jnp.float32)[..., None]
            logits = logits + _dot(x.sketch_query, signs)
        token = jnp.broadcast_to(token.reshape(1, step, page_size), stored.shape)
        visible = visibility(x.positions, token, stored, x.options)
        # Any byte decodes to something finite; the scalars of tokens never written may be NaN.
        known = jnp.where(stored[:, :, None, None], decode(values, x.value_format, axis=-2), 0.0)
        return merge(partial, softmax_part(logits, visible, known, x.options, x.logit_bias))

    steps = (jnp.max(x.lengths) + (step * page_size - 1)) // (step * page_size)
    return lax.fori_loop(0, steps, attend_step, nothing(x.query, x.value_format.dim))


def attend_tokens(
    query: Float[Array, "b t h_q d"],
    keys: Float[Array, "b h_kv s d"],
    values: Float[Array, "b h_kv s d"],
    *,
    positions: Int[Array, "b t"],
    key_positions: Int[Array, "b s"],
    stored: Bool[Array, "b s"],
    options: LogitOptions,
) -> Partial:
    """Attends over full-precision tokens at the given positions; those not stored may hold garbage."""
    logits = _dot(query, keys.astype(jnp.float32)[:, None])
    visible = visibility(positions, key_positions[:, None], stored[:, None], options)
    known = jnp.where(stored[:, None, :, None], values.astype(jnp.float32), 0.0)
    return softmax_part(logits, visible, jnp.swapaxes(known, -1, -2)[:, None], options, None)


def nothing(query: Float[Array, "b t h_q d"], dim: int) -> Partial:
    """Attention over no keys, sharded like the queries, as a loop's start has to be."""
    batch, count, heads, _ = query.shape
    acc, peak, total = (
        lax.full_like(query, value, jnp.float32, shape)
        for value, shape in (
            (0, (batch, count, heads, dim)),
            (HIDDEN, (batch, count, heads)),
            (0, (batch, count, heads)),
        )
    )
    return Partial(acc, peak, total)


def visibility(
    positions: Int[Array, "b t"],
    key_positions: Int[Array, "b n s"],
    stored: Bool[Array, "b n s"],
    options: LogitOptions,
) -> Bool[Array, "b n t s"]:
    """Which keys a query sees: keys that are stored, not in its future, and inside its sliding window."""
    distance = positions[:, None, :, None] - key_positions[:, :, None, :]
    visible = stored[:, :, None, :] & (distance >= 0)
    return visible if options.sliding_window is None else visible & (distance < options.sliding_window)


def _dot(query: Float[Array, "b t h_q d"], keys: Float[Array, "b n h_kv s d"]) -> Float[Array, "b n h_kv t g s"]:
    """Inner products; pages stay a batch axis, so that no copy of the keys in another order is needed."""
    batch, count, heads, dim = query.shape
    pages, kv_heads = keys.shape[1:3]
    grouped = jnp.moveaxis(query.reshape(batch, count, kv_heads, -1, dim), 1, 2).reshape(batch, 1, kv_heads, -1, dim)
    grouped = jnp.broadcast_to(grouped, (batch, pages, *grouped.shape[2:]))
    logits = jnp.einsum("bnhqd,bnhsd->bnhqs", grouped, keys, precision="highest")
    return logits.reshape(batch, pages, kv_heads, count, heads // kv_heads, keys.shape[3])


def softmax_part(
    logits: Float[Array, "b n h_kv t g s"],
    visible: Bool[Array, "b n t s"],
    values: Float[Array, "b n h_kv d s"],
    options: LogitOptions,
    logit_bias: Float[Array, "b t h_q"] | None,
) -> Partial:
    """Partial attention from inner products, float32 values and what each query sees."""
    batch, pages, kv_heads, count, group, tokens = logits.shape
    logits = logits * options.scale
    if logit_bias is not None:
        logits = logits + jnp.moveaxis(logit_bias.reshape(batch, 1, count, kv_heads, group), 2, 3)[..., None]
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    seen = visible[:, :, None, :, None, :]
    peak = jnp.max(jnp.where(seen, logits, HIDDEN), axis=(1, 5), keepdims=True)
    weights = jnp.where(seen, jnp.exp(logits - peak), 0.0)
    flat = weights.reshape(batch, pages, kv_heads, count * group, tokens)
    acc = jnp.sum(jnp.einsum("bnhqs,bnhds->bnhqd", flat, values, precision="highest"), axis=1)
    acc = jnp.moveaxis(acc.reshape(batch, kv_heads, count, group, -1), 2, 1).reshape(batch, count, kv_heads * group, -1)

    def per_query(x: Float[Array, "b h_kv t g"]) -> Float[Array, "b t h_q"]:
        return jnp.moveaxis(x, 2, 1).reshape(batch, count, kv_heads * group)

    return Partial(acc, per_query(peak[:, 0, ..., 0]), per_query(jnp.sum(weights, axis=(1, 5))))
