"""Attention over full-precision tokens, as programs of the prepare kernel.

The slots of a cache row are one per sink token, then a ring of the latest tokens; those of a serving engine's sequence
are blocks of a pool: its first block, then the latest ones. New tokens are not in the cache yet.
Their keys and values stay in the original basis; docs/decode_step.md shows where they join the packed tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.append.slots import token_in_slot, token_in_window
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.numerics import FLOOR, HIDDEN, INSTRUCTION_ROWS, LOG2_E, power_of_two
from pallas_kernels.tiles.intrinsics_triton import exp2, tanh
from pallas_kernels.tiles.rotation_triton import float32_product

TERMS, MOST_TERMS = {"bfloat16": 1, "float16": 2}, 3
"""bfloat16 numbers that sum to a query of a type, and of all other types."""

UPPER_HALF = -65536
"""Mask of the upper half of an int32: the bits of a float32 that bfloat16 keeps."""


@dataclasses.dataclass(frozen=True)
class Slots:
    """The full-precision slots of a sequence and KV head, in a kernel: a cache row's, or blocks of a pool.

    Attributes:
        x: The references of `exact.ExactInputs`, whose table says which of both they are.
        row: Cache row; of a table, the sequence.
        head: KV head.
        first: Slots before those of the latest tokens, static.
        length: Tokens of the sequence.
        compressed: How many of them are in pages.
        begin: With a table, how many of them are before those in pages.
    """

    x: Any
    row: jax.Array
    head: jax.Array
    first: int
    length: jax.Array
    compressed: jax.Array
    begin: Any

    @property
    def used(self) -> jax.Array:
        """Slots up to the last one that holds a token."""
        if self.x.table is None:
            return jnp.minimum(self.length, self.x.slots)
        latest = jnp.maximum(self.length - self.begin - self.compressed, 0)
        return jnp.where(self.length > 0, self.first + latest, 0)

    def tokens(self, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Position of the token in each slot [tile], and whether there is one."""
        if self.x.table is None:
            return token_in_slot(slot, self.length, self.compressed, sink_slots=self.first, slots=self.x.slots)
        return token_in_window(slot, self.length, self.begin, self.begin + self.compressed, first=self.first)

    def load(self, slot: jax.Array, wanted: jax.Array, channel: jax.Array) -> tuple[jax.Array, ...]:
        """Keys and values [tile, d padded] in the wanted slots [tile], zero elsewhere."""
        x, shape, dim = self.x, channel.shape, self.x.keys.shape[-1]
        mask = jnp.broadcast_to(wanted[:, None], shape)  # [tile, d padded]
        if dim < shape[1]:
            mask = mask & (channel < dim)
        if x.table is None:
            lead = self.row, self.head, slot[:, None]
        else:
            size = jnp.full_like(slot, x.block_size)
            where = jnp.full_like(slot, self.row), lax.div(slot, size)
            block = plt.load(x.table.at[where], mask=wanted, other=0)  # [tile]
            lead = (block * x.block_size + lax.rem(slot, size))[:, None], self.head
        at = (*(jnp.broadcast_to(i, shape) for i in lead), channel)
        return tuple(plt.load(pool.at[at], mask=mask, other=_zero(pool)) for pool in (x.keys, x.values))


def attend_slots(
    query: jax.Array,
    position: jax.Array,
    slots: Slots,
    tiles: tuple[jax.Array, jax.Array],
    *,
    tile: int,
    options: LogitOptions,
    query_terms: int,
    single: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends over a run of tiles of slots.

    Args:
        query: float32 [queries, d padded], one query row each, d padded to a power of two.
        position: int32 [queries], positions in the sequence.
        slots: The slots.
        tiles: First tile and the one behind the last.
        tile: Slots per tile.
        options: Logit options.
        query_terms: bfloat16 numbers that sum to a query.
        single: Whether the run is the first tile alone, whatever the tile behind the last.
        interpret: Whether the kernel runs as jnp.

    Returns:
        Sum of 2**(w - peak) * value [queries, d padded], peak [queries] and sum of 2**(w - peak) [queries], with w =
        logit * log2(e).
    """
    channel = lax.broadcasted_iota(jnp.int32, (tile, query.shape[1]), 1)  # [tile, d padded]
    queries = _terms(query, query_terms)  # [queries, d padded] each

    def step(index: jax.Array, state: tuple) -> tuple:
        slot = index * tile + lax.broadcasted_iota(jnp.int32, (tile,), 0)  # [tile]
        token, stored = slots.tokens(slot)  # [tile] each
        # A single tile is loaded before the lengths are known: one trip to memory less.
        wanted = slot < slots.x.slots if single else stored  # [tile]
        k, v = slots.load(slot, wanted, channel)  # [tile, d padded]
        if single:
            # Slots that were never written may hold NaN.
            v = jnp.where(stored[:, None], v, _zero(slots.x.values))
        visible = _visible(token, stored, position, options)
        return _fold(state, queries, k, v, visible, options, interpret=interpret)

    state = no_keys(query)
    return step(tiles[0], state) if single else lax.fori_loop(*tiles, step, state)


def attend_tile(
    state: tuple[jax.Array, jax.Array, jax.Array],
    query: jax.Array,
    tokens: tuple[jax.Array, jax.Array],
    where: tuple[jax.Array, jax.Array],
    position: jax.Array,
    options: LogitOptions,
    *,
    query_terms: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state of queries [queries, d padded] at `position` [queries] with the keys and values of a tile of tokens.

    Args:
        state: As `attend_slots` returns it; `no_keys` at first.
        query: float32 [queries, d padded].
        tokens: Keys and values [tile, d padded].
        where: int32 and bool [tile], position of each token and whether it exists.
        position: int32 [queries].
        options: Logit options.
        query_terms: bfloat16 numbers that sum to a query.
        interpret: Whether the kernel runs as jnp.
    """
    visible = _visible(*where, position, options)  # [queries, tile]
    return _fold(state, _terms(query, query_terms), *tokens, visible, options, interpret=interpret)


def terms_of(dtype: Any) -> int:
    """bfloat16 numbers that sum to a query of a type."""
    return TERMS.get(jnp.dtype(dtype).name, MOST_TERMS)


def no_keys(query: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state of `_fold` for queries [queries, d padded] before any key."""
    zero = jnp.zeros((query.shape[0],), jnp.float32)
    return jnp.zeros(query.shape, jnp.float32), zero + FLOOR, zero


def _fold(
    state: tuple[jax.Array, jax.Array, jax.Array],
    queries: list[jax.Array],
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    options: LogitOptions,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state with stored keys and values [tile, d padded] that queries see where `visible` [queries, tile] is."""
    acc, peak, total = state  # [queries, d padded], [queries], [queries]
    logits = _logits(queries, k, options, interpret=interpret)  # [queries, tile]
    w = jnp.where(visible, logits, HIDDEN)
    new = jnp.maximum(jnp.maximum(peak, jnp.max(w, axis=1)), FLOOR)  # [queries]
    p = exp2(w - new[:, None], interpret=interpret)  # [queries, tile]
    alpha = exp2(peak - new, interpret=interpret)  # [queries]
    parts = _terms(p, max(len(queries), 2))
    acc = acc * alpha[:, None] + _product(parts, _widened(v), transpose=False, interpret=interpret)
    return acc, new, total * alpha + jnp.sum(p, axis=1)


def _logits(queries: list[jax.Array], keys: jax.Array, options: LogitOptions, *, interpret: bool) -> jax.Array:
    """Soft-capped logits [queries, tile] times log2(e), of queries [queries, d padded] by terms."""
    logits = _product(queries, _widened(keys), transpose=True, interpret=interpret) * (options.scale * LOG2_E)
    if options.softcap is None:
        return logits
    cap = options.softcap * LOG2_E
    return cap * tanh(logits * (1.0 / cap), interpret=interpret)


def _visible(token: jax.Array, stored: jax.Array, position: jax.Array, options: LogitOptions) -> jax.Array:
    """Which tokens [tile], as far as they are stored [tile], the query at each position [queries] sees."""
    distance = position[:, None] - token[None, :]  # [queries, tile]
    visible = stored[None, :] & (distance >= 0)
    if options.sliding_window is not None:
        visible = visible & (distance < options.sliding_window)
    return visible


def query_block(count: int, group: int, largest: int) -> int:
    """Query rows per program: those of one tensor-core instruction, or of several instructions up to `largest` rows."""
    return max(INSTRUCTION_ROWS, min(largest, power_of_two(count * group)))


def _zero(pool: Any) -> jax.Array:
    return jnp.zeros((), pool.dtype)


def _widened(x: jax.Array) -> jax.Array:
    """Stored or new tokens as numbers that products take: bfloat16 or float32."""
    if x.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x, jnp.bfloat16)
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def _terms(x: jax.Array, count: int) -> list[jax.Array]:
    """`count` float32 numbers that bfloat16 holds exactly and that sum to x, largest first; three lose nothing."""
    terms = []
    for _ in range(count):
        # Cut, not rounded: a compiler may drop a conversion to bfloat16 and back.
        upper = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & UPPER_HALF, jnp.float32)
        terms.append(upper)
        x = x - upper
    return terms


def _product(terms: list[jax.Array], b: jax.Array, *, transpose: bool, interpret: bool) -> jax.Array:
    """Sum of the terms [m, k] times b [k, n] or, transposed, [n, k]: [m, n]."""
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
