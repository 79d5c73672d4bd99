"""Attention over a compressed cache in plain jnp: what the kernels must agree with."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.append.slots import first_page, page_at, token_in_slot
from pallas_kernels.attention import LogitOptions, Partial, merge
from pallas_kernels.attention.reference import attend_tokens, nothing
from tq_jax.cache import Cache, from_storage
from tq_jax.paged import PackedTokens, attend_packed

EXACT_BLOCK = 512
"""Full-precision slots attended to at a time."""


def over_cache(
    query: Array, cache: Cache, rows: Int[Array, "b"] | None, positions: Int[Array, "b t"], options: LogitOptions
) -> Partial:
    """Window and pages one after the other, in plain jnp, for float32 queries at the given positions."""
    rows = jnp.arange(cache.rows, dtype=jnp.int32) if rows is None else rows
    partial = nothing(query, query.shape[3])
    if cache.exact_keys.shape[2]:
        partial = _attend_exact(query, cache, rows, positions, options)
    if cache.pages is not None:
        partial = merge(partial, _attend_compressed(query, cache, rows, positions, options))
    return partial


def _attend_exact(
    query: Array, cache: Cache, rows: Int[Array, "b"], positions: Int[Array, "b t"], options: LogitOptions
) -> Partial:
    """Attends over sinks and ring, block by block as far as slots are in use."""
    slots = cache.exact_keys.shape[2]
    block = min(slots, EXACT_BLOCK)
    key_positions, stored = exact_positions(cache, rows)

    def attend_block(index: Array | int) -> Partial:
        start = jnp.minimum(jnp.asarray(index, jnp.int32) * block, slots - block)
        # The last block may reach back into the one before it, whose slots are not counted again.
        fresh = start + jnp.arange(block, dtype=jnp.int32)[None] >= index * block
        keys, values = (_read_block(cache, pool, rows, start, block) for pool in (cache.exact_keys, cache.exact_values))
        return attend_tokens(
            query,
            keys,
            values,
            positions=positions,
            key_positions=lax.dynamic_slice_in_dim(key_positions, start, block, axis=1),
            stored=lax.dynamic_slice_in_dim(stored, start, block, axis=1) & fresh,
            options=options,
        )

    if slots == block:
        return attend_block(0)
    used = jnp.minimum(jnp.max(cache.length[rows]), slots)
    return lax.fori_loop(
        0, (used + block - 1) // block, lambda i, part: merge(part, attend_block(i)), nothing(query, query.shape[3])
    )


def _read_block(
    cache: Cache, pool: Array, rows: Int[Array, "b"], start: Array, size: int
) -> Float[Array, "b h_kv s d"]:
    """Slots start .. start + size of some rows, without a copy of the others."""
    zero = jnp.int32(0)  # a Python number would be one of 64 bits where JAX is told to have them

    def read(row: Array) -> Array:
        return lax.dynamic_slice(pool, (row, zero, start, zero), (1, pool.shape[1], size, pool.shape[3]))[0]

    return from_storage(cache.spec, jax.vmap(read)(rows))


def exact_positions(cache: Cache, rows: Int[Array, "b"]) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
    """Position of the token in each exact slot of some rows, and whether there is one."""
    slots = cache.exact_keys.shape[2]
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows.shape[0], slots))
    length, compressed = cache.length[rows][:, None], cache.compressed[rows][:, None]
    return token_in_slot(slot, length, compressed, sink_slots=cache.spec.sinks, slots=slots)


def _attend_compressed(
    query: Array,
    cache: Cache,
    rows: Int[Array, "b"],
    positions: Int[Array, "b t"],
    options: LogitOptions,
) -> Partial:
    """Attends over the pages that are still there, whose tokens are counted from the first of them."""
    spec, statistics, compressed = cache.spec, cache.statistics, cache.compressed[rows]
    assert cache.pages is not None and cache.key_quantizer is not None and cache.value_quantizer is not None
    first = first_page(compressed, pages_per_row=spec.pages_per_row, page_size=spec.page_size)
    page = first[:, None] + jnp.arange(spec.pages_per_row, dtype=jnp.int32)[None]
    overwritten = first * spec.page_size
    tokens = PackedTokens(
        cache.pages,
        (cache.key_quantizer, cache.value_quantizer),
        page_at(page, rows[:, None], pages_per_row=spec.pages_per_row),
        compressed - overwritten,
        None if statistics is None else (statistics.mean[rows], statistics.weight[rows]),
    )
    return attend_packed(query, tokens, positions - spec.sinks - overwritten[:, None], options)
