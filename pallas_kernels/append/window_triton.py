"""The kernels around encoding: tokens leave the full-precision window, then new tokens enter it.

A new token of position p takes the ring slot of the token of position p - ring, which therefore leaves: from the ring,
or, in a chunk longer than the ring, from the chunk itself. So there is room for one leaving token beside each new
token, and no list of leaving tokens is ever made. `leave` reads the leaving tokens before `enter` overwrites them.
docs/decode_step.md draws both launches.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.append.slots import left, page_slot, slot_of, stays
from pallas_kernels.numerics import power_of_two
from pallas_kernels.pytree import pytree

TILE = 8
"""Most tokens that a program moves."""

ELEMENTS_PER_WARP = 256
"""Channels of all tokens of a program per warp, 8 per thread."""


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """Static configuration of the kernels.

    Attributes:
        sink_slots: Full-precision slots for the first tokens.
        max_tokens: Tokens that a cache row can hold.
        pages_per_row: Pages per cache row; 0 without pages.
        page_size: Tokens per page.
        leaves: Whether tokens that leave are written out.
        interpret: Whether the kernels run as jnp.
    """

    sink_slots: int
    max_tokens: int
    pages_per_row: int
    page_size: int
    leaves: bool
    interpret: bool


@pytree
class Window:
    """The full-precision tokens of a cache and its counters; arrays or references.

    Attributes:
        keys: [rows, h_kv, slots, d], the sink slots, then a ring; None without slots.
        values: [rows, h_kv, slots, d], of the type of the keys; None without slots.
        length: int32 [rows], tokens of each cache row.
        compressed: int32 [rows], tokens that left the ring.
        overflow: uint8 [rows], whether a chunk did not fit and was left out.
    """

    keys: Any
    values: Any
    length: Any
    compressed: Any
    overflow: Any


@pytree
class NewTokens:
    """A chunk of new tokens per cache row; arrays or references.

    Attributes:
        keys: [b, t, h_kv, d].
        values: [b, t, h_kv, d], of the type of the keys.
        counts: int32 [b], how many tokens of each chunk exist; None for t.
        rows: int32 [b], cache row of each chunk, all different; None for all in order. A row index outside the cache is
            ignored: nothing is read or written for it.
    """

    keys: Any
    values: Any
    counts: Any = None
    rows: Any = None

    def row(self, index: Any, window: Window) -> tuple[Any, Any]:
        """Cache row of a chunk, and whether there is such a row."""
        if self.rows is None:
            return index, True
        return existing_row(self.rows[index], window.length.shape[0])


@pytree
class LeavingTokens:
    """Outputs of `leave`; None where the plan does not ask for a field.

    Attributes:
        counters: int32 [b, 2]: tokens of the cache row before, and new tokens, -1 if they do not fit.
        keys: [b, t, h_kv, d], keys of the token that leaves beside each new token; zero where none leaves.
        values: [b, t, h_kv, d], its values.
        page_slots: int32 [b, t], page * page_size + place where it goes, -1 where none leaves or where the chunk itself
            would overwrite it.
    """

    counters: Any
    keys: Any = None
    values: Any = None
    page_slots: Any = None


def existing_row(row: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The row index moved into 0 to rows - 1, and whether it lay there before."""
    return jnp.clip(row, 0, rows - 1), (row >= 0) & (row < rows)


def leave(new: NewTokens, window: Window, plan: WindowPlan) -> LeavingTokens:
    """Reads the tokens that leave the window and finds their page slots.

    Args:
        new: Tokens that push others out.
        window: The window that new tokens are to enter.
        plan: Static configuration.
    """
    keys = new.keys
    rows, tokens = keys.shape[:2]
    out = LeavingTokens(jax.ShapeDtypeStruct((rows, 2), jnp.int32))
    if plan.leaves:
        moved = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
        out = LeavingTokens(out.counters, moved, moved, jax.ShapeDtypeStruct((rows, tokens), jnp.int32))
    [leaving] = pl.pallas_call(
        functools.partial(_leave, plan=plan),
        grid=_grid(keys.shape) if plan.leaves else (1, 1, rows),
        out_shape=[out],
        compiler_params=plt.CompilerParams(num_warps=_warps(keys.shape), num_stages=1),
        interpret=plan.interpret,
        name="leave",
    )(new, window)
    return leaving


def enter(new: NewTokens, window: Window, counters: jax.Array, plan: WindowPlan) -> Window:
    """Writes new tokens to their full-precision slots and counts them, in place.

    Args:
        new: The same tokens that `leave` was given.
        window: The same window.
        counters: int32 [b, 2], as `leave` wrote them.
        plan: Static configuration.
    """
    leaves = jax.tree.leaves(window)
    first = len(jax.tree.leaves(new)) + 1
    [entered] = pl.pallas_call(
        functools.partial(_enter, plan=plan),
        grid=_grid(new.keys.shape),
        out_shape=[jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), window)],
        input_output_aliases={first + i: i for i in range(len(leaves))},
        compiler_params=plt.CompilerParams(num_warps=_warps(new.keys.shape), num_stages=1),
        interpret=plan.interpret,
        name="enter",
    )(new, counters, window)
    return entered


def _grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Programs for blocks of tokens, KV heads and chunks of new tokens [b, t, h_kv, d]."""
    return -(-shape[1] // _tile(shape)), shape[2], shape[0]


def _tile(shape: tuple[int, ...]) -> int:
    """Tokens per program."""
    return min(TILE, power_of_two(shape[1]))


def _warps(shape: tuple[int, ...]) -> int:
    return max(1, min(4, _tile(shape) * power_of_two(shape[3]) // ELEMENTS_PER_WARP))


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The tokens of a program.

    Attributes:
        step: int32 [tile], number of each token in its chunk.
        channel: int32 [tile, d padded].
        head: KV head, a number.
        chunk: Chunk of the batch, a number.
    """

    step: jax.Array
    channel: jax.Array
    head: jax.Array
    chunk: jax.Array

    def at(self, *index: jax.Array) -> tuple[jax.Array, ...]:
        """Indices [tile, d padded] of every channel, from indices that are numbers or [tile]."""
        columns = [i[:, None] if i.ndim else i for i in index]
        return (*(jnp.broadcast_to(i, self.channel.shape) for i in columns), self.channel)

    def mask(self, wanted: jax.Array, dim: int) -> jax.Array:
        """Whether a channel exists and its token is wanted ([tile]): [tile, d padded]."""
        return jnp.broadcast_to(wanted[:, None], self.channel.shape) & (self.channel < dim)


def _tokens(shape: tuple[int, ...]) -> _Tokens:
    block, head, chunk = (pl.program_id(axis) for axis in range(3))
    tile = _tile(shape)
    step = block * tile + lax.broadcasted_iota(jnp.int32, (tile,), 0)
    return _Tokens(step, lax.broadcasted_iota(jnp.int32, (tile, power_of_two(shape[3])), 1), head, chunk)


def _ring(window: Window, plan: WindowPlan) -> int:
    return 0 if window.keys is None else window.keys.shape[2] - plan.sink_slots


def _compressed(before: jax.Array, after: jax.Array, ring: int, plan: WindowPlan) -> jax.Array:
    """Tokens that have left the ring of a row of `after` tokens, from which `before` had left already."""
    return jnp.maximum(before, left(after, sink_slots=plan.sink_slots, ring=ring))


def _leave(new: NewTokens, window: Window, out: LeavingTokens, *, plan: WindowPlan) -> None:
    """Kernel body of `leave`; program (block of tokens, KV head, chunk). All arguments are references."""
    tokens, dim = new.keys.shape[1], new.keys.shape[3]
    this, ring = _tokens(new.keys.shape), _ring(window, plan)
    row, exists = new.row(this.chunk, window)
    before = window.length[row]
    count = jnp.int32(tokens) if new.counts is None else new.counts[this.chunk]
    count = jnp.where(exists & (before + count <= plan.max_tokens), count, -1)

    @pl.when((pl.program_id(0) == 0) & (this.head == 0))
    def _() -> None:
        out.counters[this.chunk, 0] = before
        out.counters[this.chunk, 1] = count

    if not plan.leaves:
        return
    position = before + this.step - ring  # [tile], of the tokens that leave
    leaves = (this.step < count) & (position >= plan.sink_slots + window.compressed[row])  # [tile]
    written = this.step < tokens  # [tile]
    sources = (new.keys, window.keys, out.keys), (new.values, window.values, out.values)
    for chunk, exact, target in sources:
        zero = jnp.zeros((), chunk.dtype)
        late = leaves & (position >= before)  # [tile], tokens that leave from the chunk itself
        moved = plt.load(
            chunk.at[this.at(this.chunk, this.step - ring, this.head)], mask=this.mask(late, dim), other=zero
        )  # [tile, d padded]
        if ring:
            at = exact.at[this.at(row, this.head, slot_of(position, sink_slots=plan.sink_slots, ring=ring))]
            kept = plt.load(at, mask=this.mask(leaves & (position < before), dim), other=zero)  # [tile, d padded]
            moved = jnp.where(this.mask(late, dim), moved, kept)
        plt.store(target.at[this.at(this.chunk, this.step, this.head)], moved, mask=this.mask(written, dim))

    @pl.when(this.head == 0)
    def _() -> None:
        after = _compressed(window.compressed[row], before + jnp.maximum(count, 0), ring, plan)
        pages = dict(pages_per_row=plan.pages_per_row, page_size=plan.page_size)
        slot, there = page_slot(position - plan.sink_slots, row, after, **pages)  # [tile] each
        at = out.page_slots.at[jnp.full_like(this.step, this.chunk), this.step]
        plt.store(at, jnp.where(leaves & there, slot, -1), mask=written)


def _enter(new: NewTokens, counters: Any, window: Window, out: Window, *, plan: WindowPlan) -> None:
    """Kernel body of `enter`; program (block of tokens, KV head, chunk). All arguments are references."""
    this, ring = _tokens(new.keys.shape), _ring(window, plan)
    row, exists = new.row(this.chunk, window)
    before, count = counters[this.chunk, 0], counters[this.chunk, 1]
    after = before + jnp.maximum(count, 0)
    position = before + this.step  # [tile]
    kept = (position < after) & stays(position, after, sink_slots=plan.sink_slots, ring=ring)  # [tile]
    for chunk, exact in ((new.keys, out.keys), (new.values, out.values)):
        if exact is None:
            continue
        mask = this.mask(kept, new.keys.shape[3])  # [tile, d padded]
        at = chunk.at[this.at(this.chunk, this.step, this.head)]
        moved = plt.load(at, mask=mask, other=jnp.zeros((), chunk.dtype))  # [tile, d padded]
        plt.store(
            exact.at[this.at(row, this.head, slot_of(position, sink_slots=plan.sink_slots, ring=ring))],
            moved,
            mask=mask,
        )

    @pl.when((pl.program_id(0) == 0) & (this.head == 0) & exists)
    def _() -> None:
        out.length[row] = after
        out.compressed[row] = _compressed(window.compressed[row], after, ring, plan)
        out.overflow[row] = jnp.where(count < 0, jnp.ones((), window.overflow.dtype), window.overflow[row])
