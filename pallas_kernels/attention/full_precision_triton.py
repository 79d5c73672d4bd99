"""Attention over full-precision slots, as programs of the prepare kernel: sinks, then a ring of the latest tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.numerics import FLOOR, HIDDEN, LOG2_E, power_of_two
from pallas_kernels.tiles.intrinsics_triton import exp2, tanh
from pallas_kernels.tiles.rotation_triton import float32_product

UPPER_HALF = -65536


def attend_slots(
    query: jax.Array,
    position: jax.Array,
    keys: Any,
    values: Any,
    where: tuple[jax.Array, jax.Array],
    tiles: tuple[jax.Array, jax.Array],
    counts: tuple[jax.Array, jax.Array],
    *,
    tile: int,
    sinks: int,
    options: LogitOptions,
    query_terms: int,
    single: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends over a run of tiles of slots.

    Args:
        query: float32 [queries, d], d padded to a power of two.
        position: int32 [queries], positions in the sequence.
        keys: Reference [rows, h_kv, slots, d], bfloat16 as its bits.
        values: Likewise.
        where: Row and KV head.
        tiles: First tile and the one behind the last.
        counts: Tokens of the row and, of them, tokens in pages.
        tile: Slots of a tile.
        sinks: Slots before the ring.
        options: Logit options.
        query_terms: bfloat16 numbers that a query is the sum of.
        single: Whether the run is the first tile alone, whatever the one behind the last.
        interpret: Whether the kernel runs as jnp.

    Returns:
        Sum of 2**(w - peak) * value [queries, d], peak and sum of 2**(w - peak) [queries].
    """
    slots, dim = keys.shape[2:]
    padded = query.shape[1]
    shape = (tile, padded)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)
    queries = _terms(query, query_terms)

    def step(index: jax.Array, state: tuple) -> tuple:
        acc, peak, total = state
        slot = index * tile + lax.broadcasted_iota(jnp.int32, (tile,), 0)
        token, stored = slot_positions(slot, *counts, sinks=sinks, slots=slots)
        # A tile alone is loaded before the counts are known: one trip to memory less.
        mask = jnp.broadcast_to((slot < slots if single else stored)[:, None], shape)
        if dim < padded:
            mask = mask & (channel < dim)
        at = (*(jnp.broadcast_to(i, shape) for i in (*where, slot[:, None])), channel)
        k, v = (plt.load(pool.at[at], mask=mask, other=_zero(pool)) for pool in (keys, values))
        if single:
            v = jnp.where(stored[:, None], v, _zero(values))
        logits = _product(queries, _widened(k), transpose=True, interpret=interpret) * (options.scale * LOG2_E)
        if options.softcap is not None:
            cap = options.softcap * LOG2_E
            logits = cap * tanh(logits * (1.0 / cap), interpret=interpret)
        distance = position[:, None] - token[None, :]
        visible = stored[None, :] & (distance >= 0)
        if options.sliding_window is not None:
            visible = visible & (distance < options.sliding_window)
        w = jnp.where(visible, logits, HIDDEN)
        new = jnp.maximum(jnp.maximum(peak, jnp.max(w, axis=1)), FLOOR)
        p = exp2(w - new[:, None], interpret=interpret)
        alpha = exp2(peak - new, interpret=interpret)
        parts = _terms(p, max(query_terms, 2))
        acc = acc * alpha[:, None] + _product(parts, _widened(v), transpose=False, interpret=interpret)
        return acc, new, total * alpha + jnp.sum(p, axis=1)

    zero = jnp.zeros((query.shape[0],), jnp.float32)
    state = (jnp.zeros(query.shape, jnp.float32), zero + FLOOR, zero)
    return step(tiles[0], state) if single else lax.fori_loop(*tiles, step, state)


def slot_positions(
    slot: jax.Array, length: jax.Array, compressed: jax.Array, *, sinks: int, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Position of the token in each slot, and whether there is one."""
    in_sinks = slot < sinks
    if slots == sinks:
        return slot, in_sinks & (slot < length)
    ring = slots - sinks
    latest = length - sinks - 1
    behind = lax.rem(latest - (slot - sinks) + ring, jnp.full_like(slot, ring))
    address = latest - behind
    in_ring = (slot < slots) & (latest >= 0) & (address >= compressed)
    return jnp.where(in_sinks, slot, sinks + address), jnp.where(in_sinks, slot < length, in_ring)


def query_block(count: int, group: int, largest: int) -> int:
    """Queries of one KV head that a program takes: what one tensor-core instruction has rows for, or several."""
    return max(16, min(largest, power_of_two(count * group)))


def _zero(pool: Any) -> jax.Array:
    return jnp.zeros((), pool.dtype)


def _widened(x: jax.Array) -> jax.Array:
    """Stored tokens as numbers that products take."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x.astype(jnp.float32)


def _terms(x: jax.Array, count: int) -> list[jax.Array]:
    """float32 numbers that bfloat16 holds and that sum to x, largest first; three are exact."""
    terms = []
    for _ in range(count):
        # Cut, not rounded: a compiler may skip the way to bfloat16 and back.
        upper = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & UPPER_HALF, jnp.float32)
        terms.append(upper)
        x = x - upper
    return terms


def _product(terms: list[jax.Array], b: jax.Array, *, transpose: bool, interpret: bool) -> jax.Array:
    """Sum of the terms times b [k, n] or, transposed, [n, k]."""
    if b.dtype == jnp.float32:
        whole = terms[0]
        for term in terms[1:]:
            whole = whole + term
        return float32_product(whole, b, interpret=interpret, transpose=transpose)
    out = None
    for term in reversed(terms):
        product = lax.dot_general(
            term.astype(jnp.bfloat16),
            b,
            (((1,), (1 if transpose else 0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        out = product if out is None else out + product
    assert out is not None
    return out
