"""The kernels around encoding: tokens leave the full-precision window, then new ones enter it.

A new token of position p takes the ring slot of the one of position p - ring, which therefore leaves: from the ring,
or, in a chunk longer than the ring, from the chunk itself. So there is a place for one leaving token beside each new
one, and no list of them is ever made. What leaves is read by one kernel and overwritten by the other.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.numerics import power_of_two

TILE = 8
"""Most tokens a program moves."""


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """What is static about the kernels.

    Attributes:
        sinks: Full-precision slots for the first tokens.
        max_tokens: Tokens that a row can hold.
        pages_per_row: Pages of a row.
        page_size: Tokens a page.
        leaves: Whether tokens that leave are written out.
        interpret: Whether the kernels run as jnp.
    """

    sinks: int
    max_tokens: int
    pages_per_row: int
    page_size: int
    leaves: bool
    interpret: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """The full-precision tokens of a cache and its counters; arrays or references.

    Attributes:
        keys: [rows, h_kv, slots, d], the first tokens, then a ring; None without slots.
        values: Likewise.
        length: int32 [rows], tokens.
        compressed: int32 [rows], tokens in pages.
        overflow: uint8 [rows], whether a chunk did not fit and was left out.
    """

    keys: Any
    values: Any
    length: Any
    compressed: Any
    overflow: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class New:
    """New tokens; arrays or references.

    Attributes:
        keys: [b, t, h_kv, d].
        values: Likewise.
        counts: int32 [b], how many of them exist; None for t.
        rows: int32 [b], the rows of the window that they are for, all different; None for all in order. Of a row that
            there is not nothing is read or written.
    """

    keys: Any
    values: Any
    counts: Any = None
    rows: Any = None

    def row(self, index: Any, window: Window) -> tuple[Any, Any]:
        """Row of the window, and whether there is such a row."""
        if self.rows is None:
            return index, True
        return existing_row(self.rows[index], window.length.shape[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Left:
    """What `leave` writes; None for what it was not asked for.

    Attributes:
        counters: int32 [b, 2]: tokens before, and new tokens, -1 where they do not fit.
        keys: [b, t, h_kv, d], tokens that leave.
        values: Likewise.
        slots: int32 [b, t], page * page_size + place of each, -1 where none leaves.
    """

    counters: Any
    keys: Any = None
    values: Any = None
    slots: Any = None


def existing_row(row: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """A row that there is, and whether it is the given one."""
    return jnp.clip(row, 0, rows - 1), (row >= 0) & (row < rows)


def leave(new: New, window: Window, plan: WindowPlan) -> Left:
    """Reads the tokens that leave the window and works out where they go.

    Args:
        new: Tokens that push them out.
        window: Where those are to enter.
        plan: What is static.
    """
    keys = new.keys
    rows, tokens = keys.shape[:2]
    out = Left(jax.ShapeDtypeStruct((rows, 2), jnp.int32))
    if plan.leaves:
        moved = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
        out = Left(out.counters, moved, moved, jax.ShapeDtypeStruct((rows, tokens), jnp.int32))
    [left] = pl.pallas_call(
        functools.partial(_leave, plan=plan),
        grid=_grid(keys.shape) if plan.leaves else (1, 1, rows),
        out_shape=[out],
        compiler_params=plt.CompilerParams(num_warps=_warps(keys.shape), num_stages=1),
        interpret=plan.interpret,
        name="leave",
    )(new, window)
    return left


def enter(new: New, window: Window, counters: jax.Array, plan: WindowPlan) -> Window:
    """Writes new tokens to their full-precision slots and counts them, in place.

    Args:
        new: As for `leave`.
        window: Likewise.
        counters: As `leave` wrote them.
        plan: What is static.
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
    """Programs for blocks of tokens, heads and rows."""
    return -(-shape[1] // _tile(shape)), shape[2], shape[0]


def _tile(shape: tuple[int, ...]) -> int:
    return min(TILE, power_of_two(shape[1]))


def _warps(shape: tuple[int, ...]) -> int:
    return max(1, min(4, _tile(shape) * power_of_two(shape[3]) // 256))


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The tokens of a program: [tile] each of step in the chunk; channels [tile, d padded]; KV head and row."""

    step: jax.Array
    channel: jax.Array
    head: jax.Array
    row: jax.Array

    def at(self, *index: jax.Array) -> tuple[jax.Array, ...]:
        """An index of every channel; of those [tile] wide, a column."""
        columns = [i[:, None] if i.ndim else i for i in index]
        return (*(jnp.broadcast_to(i, self.channel.shape) for i in columns), self.channel)

    def mask(self, wanted: jax.Array, dim: int) -> jax.Array:
        """Existing channels of the wanted [tile] tokens."""
        return jnp.broadcast_to(wanted[:, None], self.channel.shape) & (self.channel < dim)


def _tokens(shape: tuple[int, ...]) -> _Tokens:
    block, head, row = (pl.program_id(axis) for axis in range(3))
    tile = _tile(shape)
    step = block * tile + lax.broadcasted_iota(jnp.int32, (tile,), 0)
    return _Tokens(step, lax.broadcasted_iota(jnp.int32, (tile, power_of_two(shape[3])), 1), head, row)


def _slot(position: jax.Array, sinks: int, ring: int) -> jax.Array:
    """Full-precision slot of positions."""
    behind = lax.rem(position - sinks, jnp.full_like(position, max(ring, 1)))
    return jnp.where(position < sinks, position, sinks + behind)


def _ring(window: Window, plan: WindowPlan) -> int:
    return 0 if window.keys is None else window.keys.shape[2] - plan.sinks


def _leave(new: New, window: Window, out: Left, *, plan: WindowPlan) -> None:
    tokens, dim = new.keys.shape[1], new.keys.shape[3]
    this, ring = _tokens(new.keys.shape), _ring(window, plan)
    row, exists = new.row(this.row, window)
    before = window.length[row]
    count = jnp.int32(tokens) if new.counts is None else new.counts[this.row]
    count = jnp.where(exists & (before + count <= plan.max_tokens), count, -1)

    @pl.when((pl.program_id(0) == 0) & (this.head == 0))
    def _() -> None:
        out.counters[this.row, 0] = before
        out.counters[this.row, 1] = count

    if not plan.leaves:
        return
    old = before + this.step - ring
    leaves = (this.step < count) & (old >= plan.sinks + window.compressed[row])
    written = this.step < tokens
    sources = (new.keys, window.keys, out.keys), (new.values, window.values, out.values)
    for chunk, exact, target in sources:
        zero = jnp.zeros((), chunk.dtype)
        late = leaves & (old >= before)
        moved = plt.load(
            chunk.at[this.at(this.row, this.step - ring, this.head)], mask=this.mask(late, dim), other=zero
        )
        if ring:
            at = exact.at[this.at(row, this.head, _slot(old, plan.sinks, ring))]
            kept = plt.load(at, mask=this.mask(leaves & (old < before), dim), other=zero)
            moved = jnp.where(this.mask(late, dim), moved, kept)
        plt.store(target.at[this.at(this.row, this.step, this.head)], moved, mask=this.mask(written, dim))

    @pl.when(this.head == 0)
    def _() -> None:
        address = row * (plan.pages_per_row * plan.page_size) + old - plan.sinks
        at = out.slots.at[jnp.full_like(this.step, this.row), this.step]
        plt.store(at, jnp.where(leaves, address, -1), mask=written)


def _enter(new: New, counters: Any, window: Window, out: Window, *, plan: WindowPlan) -> None:
    this, ring = _tokens(new.keys.shape), _ring(window, plan)
    row, exists = new.row(this.row, window)
    before, count = counters[this.row, 0], counters[this.row, 1]
    after = before + jnp.maximum(count, 0)
    position = before + this.step
    kept = (position < after) & ((position < plan.sinks) | (position >= after - ring))
    for chunk, exact in ((new.keys, out.keys), (new.values, out.values)):
        if exact is None:
            continue
        mask = this.mask(kept, new.keys.shape[3])
        moved = plt.load(chunk.at[this.at(this.row, this.step, this.head)], mask=mask, other=jnp.zeros((), chunk.dtype))
        plt.store(exact.at[this.at(row, this.head, _slot(position, plan.sinks, ring))], moved, mask=mask)

    @pl.when((pl.program_id(0) == 0) & (this.head == 0) & exists)
    def _() -> None:
        out.length[row] = after
        out.compressed[row] = jnp.maximum(window.compressed[row], after - plan.sinks - ring)
        out.overflow[row] = jnp.where(count < 0, jnp.ones((), window.overflow.dtype), window.overflow[row])
