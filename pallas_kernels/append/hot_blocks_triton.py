"""The kernels that give slots of a hot pool to the blocks of a serving engine, and list the tokens that are read there.

`interop.vllm.window` states the rules of the tables, in torch operations that give the same tables. `mark` notes the
blocks that a step begins and the slots that it needs, `choose` lists the blocks that want a slot and sorts the slots by
age, `give` gives the oldest slots to these blocks, and `place` finds the places of tokens. If a step begins no block,
`choose` and `give` end at once. No program reads an element that another one of its launch writes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.numerics import power_of_two
from pallas_kernels.pytree import pytree

TILE, COPIED = 256, 1024
"""Tokens or entries of requests per program; most columns of a block table per program that reads."""

SORTED = 64
"""Slots per program that sorts, and per step of its loop."""

GIVEN = 1024
"""Entries of requests per step of `give`."""


@dataclasses.dataclass(frozen=True)
class HotPlan:
    """Static configuration of the kernels.

    Attributes:
        window: Latest tokens that are read in full precision.
        sinks: First tokens that are.
        size: Tokens per block.
        first: Entries of a request for the block of its first tokens, 0 or 1.
        entries: Entries of a request; those behind the first ones are for blocks of the window.
        interpret: Whether the kernels run as jnp.
    """

    window: int
    sinks: int
    size: int
    first: int
    entries: int
    interpret: bool = False

    @property
    def padded(self) -> int:
        """Entries of a request, padding included."""
        return power_of_two(self.entries)


@pytree
class HotBlocks:
    """The tables and what a step reads and writes beside them; int32 arrays or references.

    Attributes:
        counts: [2], tokens and requests of the step; both arrays of a step are longer.
        clock: [2], steps so far, and the latest step that began a block.
        hot: [blocks + 1], slot of each block, -1 for none; the last one is for no block.
        begun: [blocks + 1], latest step that began each block.
        owner: [slots + 1], block of each slot, `blocks` for none; the last one is for no slot.
        used: [slots + 1], latest step that needed each slot.
        order: [slots], the slots by age, the oldest first.
        wanted: [rows * entries padded], blocks that want a slot, -1 for none.
        slots: [tokens], page slot of each token of the step, -1 for padding and for all tokens behind the step's.
        places: [tokens, 2], place of each token of the step in the hot pools, as the halves of an int64; -1 for none.
        table: [rows, n], blocks of each request whose tokens are read from codes.
        lengths: [rows], tokens of each request.
        exact: [rows, entries], slots of the blocks of each request that are read in full precision.
        begin: [rows], first tokens of each request that are read there.
        packed: [rows], tokens behind these that are read from codes.
        cold: [rows, 2], tokens of windows and first tokens that were read from codes, as the halves of an int64.
    """

    counts: Any
    clock: Any
    hot: Any
    begun: Any
    owner: Any
    used: Any
    order: Any
    wanted: Any
    slots: Any
    places: Any
    table: Any
    lengths: Any
    exact: Any
    begin: Any
    packed: Any
    cold: Any


@pytree
class Requests:
    """The requests of a step; int32 arrays or references.

    Attributes:
        table: [rows, n], blocks of each request.
        lengths: [rows], tokens of each request; 0 for padding.
        slots: [tokens, 2], page slot of each token of the step, as the halves of an int64, negative for padding; None
            for requests that are only read.
    """

    table: Any
    lengths: Any
    slots: Any = None


def update_hot_blocks(requests: Requests, tables: HotBlocks, plan: HotPlan) -> HotBlocks:
    """Gives slots to the blocks that a step begins, and finds the places of its tokens, in place.

    Args:
        requests: The requests, of lengths once the step is written; `tables.counts` says how many there are.
        tables: The tables.
        plan: Static configuration.
    """
    entries, slots = tables.wanted.shape[0], tables.order.shape[0]
    tables = _launch(_mark, (pl.cdiv(tables.slots.shape[0], TILE) + pl.cdiv(entries, TILE),), 4)(requests, tables, plan)
    tables = _launch(_choose, (pl.cdiv(slots, SORTED) + pl.cdiv(entries, TILE),), 4)(requests, tables, plan)
    tables = _launch(_give, (1,), 8)(requests, tables, plan)
    return _launch(_place, (pl.cdiv(tables.slots.shape[0], TILE),), 4)(requests, tables, plan)


def read_hot_blocks(requests: Requests, tables: HotBlocks, plan: HotPlan) -> HotBlocks:
    """Lists what requests read from codes and what in full precision, in place.

    Args:
        requests: The requests; `tables.counts` says how many there are.
        tables: The tables, after the update of the step.
        plan: Static configuration.
    """
    rows, columns = tables.table.shape
    return _launch(_read, (rows, pl.cdiv(columns, _copied(columns))), 4)(requests, tables, plan)


def _copied(columns: int) -> int:
    """Columns of a block table per program that reads."""
    return min(COPIED, power_of_two(columns))


def _launch(body: Callable, grid: tuple[int, ...], num_warps: int) -> Callable[..., HotBlocks]:
    """The function of requests, tables and plan that launches a kernel on the tables, in place."""

    def run(requests: Requests, tables: HotBlocks, plan: HotPlan) -> HotBlocks:
        first = len(jax.tree.leaves(requests))
        [changed] = pl.pallas_call(
            functools.partial(body, plan=plan),
            grid=grid,
            out_shape=[jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tables)],
            input_output_aliases={first + i: i for i in range(len(jax.tree.leaves(tables)))},
            compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
            interpret=plan.interpret,
            name=body.__name__.removeprefix("_") + "_hot_blocks",
        )(requests, tables)
        return changed

    return run


def _numbers(program: jax.Array, size: int) -> jax.Array:
    """Numbers of the items of a program, of so many each: [size]."""
    return program * size + lax.broadcasted_iota(jnp.int32, (size,), 0)


def _divided(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of numbers that are not negative."""
    by = jnp.full_like(x, divisor)
    return lax.div(x, by), lax.rem(x, by)


def _load(ref: Any, at: Any, there: jax.Array, other: int = -1) -> jax.Array:
    """Elements of `ref` at indices, `other` where `there` is false."""
    index = tuple(jnp.where(there, i, 0) for i in _tuple(at))
    return plt.load(ref.at[index], mask=there, other=jnp.int32(other))


def _store(ref: Any, at: Any, x: jax.Array, there: jax.Array) -> None:
    """Writes elements of `ref` at indices where `there` is true; for jnp the others lie behind the array."""
    index = tuple(jnp.where(there, i, size) for i, size in zip(_tuple(at), ref.shape, strict=True))
    plt.store(ref.at[index], jnp.broadcast_to(x, there.shape), mask=there)


def _tuple(at: Any) -> tuple[jax.Array, ...]:
    return at if isinstance(at, tuple) else (at,)


def _store_halves(ref: Any, at: jax.Array, x: jax.Array, there: jax.Array) -> None:
    """Writes int32 numbers to int64 elements of `ref` [n, 2]."""
    _store(ref, (at, jnp.zeros_like(at)), x, there)
    _store(ref, (at, jnp.ones_like(at)), jnp.where(x < 0, -1, 0), there)


@pytree
class _Entries:
    """Blocks that requests read in full precision, one per element.

    Attributes:
        number: Number of the block in its request.
        there: Whether the request has tokens in it.
        block: Its name, -1 for none.
    """

    number: jax.Array
    there: jax.Array
    block: jax.Array

    def slots(self, tables: HotBlocks) -> jax.Array:
        """Slots of the blocks, -1 for none."""
        return _load(tables.hot, self.block, self.block >= 0)


def _entries(
    x: Requests, row: jax.Array, entry: jax.Array, length: jax.Array, wanted: jax.Array, plan: HotPlan
) -> _Entries:
    """Entries of rows, of lengths, which are to be looked up where `wanted`."""
    begin, _ = _divided(jnp.maximum(length - plan.window, 0), plan.size)
    number = jnp.where(entry < plan.first, 0, begin + entry - plan.first)
    there = wanted & (entry < plan.entries) & (number * plan.size < length)
    name = _load(x.table, (row, jnp.minimum(number, x.table.shape[1] - 1)), there)
    return _Entries(number, there, jnp.where(name > 0, name, -1))


def _entries_of(program: jax.Array, x: Requests, tables: HotBlocks, plan: HotPlan) -> tuple[jax.Array, _Entries]:
    """Numbers of a program's entry of each element, and its entries, over all rows: [TILE]."""
    item = _numbers(program, TILE)
    row, entry = _divided(item, plan.padded)
    wanted = row < tables.counts[1]
    return entry, _entries(x, row, entry, _load(x.lengths, row, wanted, 0), wanted, plan)


def _mark(x: Requests, _: HotBlocks, out: HotBlocks, *, plan: HotPlan) -> None:
    """Kernel body; a program marks blocks of tokens as begun, or slots as used. All arguments are references."""
    program, step = pl.program_id(0), out.clock[0] + 1
    tokens = out.slots.shape[0]
    marking = pl.cdiv(tokens, TILE)

    @pl.when(program < marking)
    def _() -> None:
        token = _numbers(program, TILE)
        slot = _load(x.slots, (token, jnp.zeros_like(token)), token < jnp.minimum(out.counts[0], tokens))
        slot = jnp.maximum(slot, -1)
        _store(out.slots, token, slot, token < tokens)
        block, place = _divided(jnp.maximum(slot, 0), plan.size)
        begins = (slot >= 0) & (place == 0)
        _store(out.begun, block, step, begins)

        @pl.when(jnp.sum(begins.astype(jnp.int32)) > 0)
        def _() -> None:
            out.clock[1] = step

    @pl.when(program >= marking)
    def _() -> None:
        slot = _entries_of(program - marking, x, out, plan)[1].slots(out)
        _store(out.used, slot, step, slot >= 0)


def _choose(x: Requests, _: HotBlocks, out: HotBlocks, *, plan: HotPlan) -> None:
    """Kernel body; a program sorts slots, or lists blocks that want one. All arguments are references."""
    program, step = pl.program_id(0), out.clock[0] + 1
    sorting = pl.cdiv(out.order.shape[0], SORTED)
    begins = out.clock[1] == step

    @pl.when(begins & (program < sorting))
    def _() -> None:
        _sort(program, out)

    @pl.when(begins & (program >= sorting))
    def _() -> None:
        entry, entries = _entries_of(program - sorting, x, out, plan)
        begun = _load(out.begun, entries.block, entries.block >= 0) == step
        wanted = (entries.block >= 0) & (entries.slots(out) < 0) & begun
        if plan.first:
            wanted &= (entry < plan.first) | (entries.number > 0)  # the first block once
        item = _numbers(program - sorting, TILE)
        _store(out.wanted, item, jnp.where(wanted, entries.block, -1), item < out.wanted.shape[0])


def _sort(program: jax.Array, out: HotBlocks) -> None:
    """Writes the program's slots to their places in the order of age; equally old slots stay in order."""
    count = out.order.shape[0]
    mine = _numbers(program, SORTED)
    age = _load(out.used, mine, mine < count)

    def before(step: jax.Array, place: jax.Array) -> jax.Array:
        other = _numbers(step, SORTED)
        theirs = _load(out.used, other, other < count)
        same = (theirs[None, :] == age[:, None]) & (other[None, :] < mine[:, None])
        older = (other < count)[None, :] & ((theirs[None, :] < age[:, None]) | same)
        return place + jnp.sum(older.astype(jnp.int32), axis=1)

    place = lax.fori_loop(0, pl.cdiv(count, SORTED), before, jnp.zeros_like(mine))
    _store(out.order, place, mine, mine < count)


def _give(x: Requests, _: HotBlocks, out: HotBlocks, *, plan: HotPlan) -> None:
    """Kernel body of one program; gives slots to the blocks that want one. All arguments are references."""
    del x
    step, entries = out.clock[0] + 1, out.counts[1] * plan.padded

    def give(index: jax.Array, before: jax.Array) -> jax.Array:
        item = _numbers(index, GIVEN)
        block = _load(out.wanted, item, item < entries)
        wanted = (block >= 0).astype(jnp.int32)
        rank = before + jnp.cumsum(wanted) - 1
        slot = _load(out.order, rank, (block >= 0) & (rank < out.order.shape[0]))
        given = (slot >= 0) & (_load(out.used, slot, slot >= 0) < step)
        # A block that has a slot wants none, so that no block of `old` is one of `block`.
        old = _load(out.owner, slot, given)
        _store(out.hot, old, jnp.int32(-1), given & (_load(out.hot, old, given) == slot))
        _store(out.hot, block, slot, given)
        _store(out.owner, slot, block, given)
        _store(out.used, slot, step, given)
        return before + jnp.sum(wanted)

    @pl.when(out.clock[1] == step)
    def _() -> None:
        lax.fori_loop(0, lax.div(entries + (GIVEN - 1), jnp.int32(GIVEN)), give, jnp.int32(0))


def _place(x: Requests, _: HotBlocks, out: HotBlocks, *, plan: HotPlan) -> None:
    """Kernel body; a program finds the places of tokens, the first one ends the step. All arguments are references."""
    del x
    program = pl.program_id(0)
    token = _numbers(program, TILE)
    there = token < jnp.minimum(out.counts[0], out.slots.shape[0])
    slot = _load(out.slots, token, there)
    block, within = _divided(jnp.maximum(slot, 0), plan.size)
    hot = _load(out.hot, block, slot >= 0)
    _store_halves(out.places, token, jnp.where(hot >= 0, hot * plan.size + within, -1), there)

    @pl.when(program == 0)
    def _() -> None:
        out.clock[0] = out.clock[0] + 1


def _read(x: Requests, _: HotBlocks, out: HotBlocks, *, plan: HotPlan) -> None:
    """Kernel body; program (request, run of columns of its table). All arguments are references."""
    row, run = pl.program_id(0), pl.program_id(1)
    real = row < out.counts[1]

    @pl.when(real)
    def _() -> None:
        _read_request(row, run, x, out, plan)

    @pl.when(jnp.logical_not(real) & (run == 0))
    def _() -> None:
        zero = jnp.int32(0)
        out.lengths[row], out.begin[row], out.packed[row] = zero, zero, zero


def _read_request(row: jax.Array, run: jax.Array, x: Requests, out: HotBlocks, plan: HotPlan) -> None:
    length = x.lengths[row]
    entry = lax.broadcasted_iota(jnp.int32, (plan.padded,), 0)
    rows, lengths = jnp.full_like(entry, row), jnp.full_like(entry, length)
    entries = _entries(x, rows, entry, lengths, entry >= 0, plan)
    slot, stop, begin = entries.slots(out), length, jnp.zeros_like(length)
    behind = entry - plan.first + 1  # entries of the window up to this one
    cold = jnp.zeros_like(length)  # entries of the window up to the last one without a slot
    if plan.entries > plan.first:
        cold = jnp.max(jnp.where(entries.there & (slot < 0) & (behind > 0), behind, 0))
        start = _divided(jnp.maximum(length - plan.window, 0), plan.size)[0]
        stop = jnp.minimum((start + cold) * plan.size, length)
    exact = jnp.zeros_like(length)
    if plan.first:
        exact = jnp.max(jnp.where((entry == 0) & (slot >= 0) & (stop >= plan.size), 1, 0))
        begin = exact * plan.size
    columns = x.table.shape[1]
    column = _numbers(run, _copied(columns))
    last = jnp.minimum(column + exact, columns - 1)
    at = jnp.full_like(column, row)
    _store(out.table, (at, column), _load(x.table, (at, last), column < columns), column < columns)

    @pl.when(run == 0)
    def _() -> None:
        shifted = jnp.where(entry < plan.first, entry, jnp.minimum(entry + cold, plan.entries - 1))
        later = _entries(x, rows, shifted, lengths, entry < plan.entries, plan).slots(out)
        _store(out.exact, (rows, entry), jnp.maximum(later, 0), entry < plan.entries)
        out.lengths[row], out.begin[row], out.packed[row] = length, begin, stop - begin
        latest = jnp.maximum(length - plan.window, 0)
        missed = jnp.maximum(stop - jnp.maximum(latest, begin), 0)
        missed += jnp.maximum(jnp.minimum(jnp.minimum(stop, latest), plan.sinks) - begin, 0)
        low = out.cold[row, 0]
        out.cold[row, 0] = low + missed

        @pl.when((low < 0) & (low + missed >= 0))  # past 2**32
        def _() -> None:
            out.cold[row, 1] = out.cold[row, 1] + 1
