"""The prepare kernel: everything that decode needs besides the pages, and attention over full-precision slots.

Its programs do three things side by side: attend over a run of full-precision slots; rotate a block of queries, with
the bias of centred keys and the sketch of Prod keys; and write where the pages of a row are and what its queries see.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode.basis import Basis, basis_tile, float32_product, power_of_two
from pallas_kernels.decode.exact_triton import attend_slots, query_block
from pallas_kernels.decode.options import LogitOptions

ROWS, COORDINATES, TABLE_BLOCK = 16, 32, 1024
"""Queries and coordinates of a program that rotates, entries of one that writes the block table."""

TERMS = {"bfloat16": 1, "float16": 2}
"""bfloat16 numbers that sum to a query of a type; three for others."""

SLOT_PROGRAMS = 132 * 4
"""Programs to aim at for full-precision slots."""


@dataclasses.dataclass(frozen=True)
class PreparePlan:
    """What is static about the kernel.

    Attributes:
        options: Logit options.
        kv_heads: KV heads.
        sinks: Full-precision slots before the ring.
        pages_per_row: Pages of a cache row; 0 without compressed tokens.
        sketch_gain: Factor of the sketch of queries.
        slot_tile: Full-precision slots a step.
        slot_splits: Programs for the slots of a sequence and KV head; 0 without slots.
        num_warps: Warps a program.
        interpret: Whether the kernel runs as jnp.
    """

    options: LogitOptions
    kv_heads: int
    sinks: int
    pages_per_row: int
    sketch_gain: float
    slot_tile: int
    slot_splits: int
    num_warps: int
    interpret: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrepareInputs:
    """Arrays of the kernel, or references; None for what there is not.

    Attributes:
        query: [b, t, h_q, d] of any float type.
        rows: int32 [b], cache row of each sequence; None for all in order.
        counts: int32 [b], queries of each sequence; None for t.
        length: int32 [rows], tokens.
        compressed: int32 [rows], tokens in pages.
        keys: [rows, h_kv, slots, d], full-precision keys.
        values: Likewise.
        mean: float32 [rows, h_kv, d], subtracted from compressed keys.
        weight: float32 [rows, h_kv, d], multiplied to compressed keys.
        basis: Of the keys.
        sketch: float32 [d, d], matrix of Prod keys.
    """

    query: Any
    rows: Any
    counts: Any
    length: Any
    compressed: Any
    keys: Any
    values: Any
    mean: Any
    weight: Any
    basis: Basis | None
    sketch: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the kernel writes; None for what there is not.

    Attributes:
        acc: float32 [b, h_kv, slot_splits, t * g, d], of full-precision slots, see `merge_triton`.
        peak: float32 [b, h_kv, slot_splits, t * g].
        total: Likewise.
        query: float32 [b, t, h_q, d], rotated.
        bias: float32 [b, t, h_q].
        sketch: float32 [b, t, h_q, d].
        table: int32 [b, pages_per_row].
        lengths: int32 [b], tokens in pages.
        positions: int32 [b, t], of queries, counted from the first token behind the sinks.
    """

    acc: Any = None
    peak: Any = None
    total: Any = None
    query: Any = None
    bias: Any = None
    sketch: Any = None
    table: Any = None
    lengths: Any = None
    positions: Any = None


def prepare_plan(
    query_shape: tuple[int, ...],
    slots_shape: tuple[int, ...],
    itemsize: int,
    *,
    options: LogitOptions,
    sinks: int,
    pages_per_row: int,
    sketch_gain: float,
    interpret: bool,
) -> PreparePlan:
    """The plan for queries [b, t, h_q, d] and slots [rows, h_kv, slots, d] of a size an element."""
    batch, count, heads, dim = query_shape
    kv_heads, slots = slots_shape[1:3]
    # What a tile and its products take of registers and shared memory.
    largest = 64 * 128 * 2 // (power_of_two(dim) * itemsize)
    tile = max(16, min(64, largest, power_of_two(slots))) if slots else 16
    blocks = -(-count * heads // kv_heads // query_block(count, heads // kv_heads))
    most = max(1, SLOT_PROGRAMS // (batch * kv_heads * blocks))
    return PreparePlan(
        options=options,
        kv_heads=kv_heads,
        sinks=sinks,
        pages_per_row=pages_per_row,
        sketch_gain=sketch_gain,
        slot_tile=tile,
        slot_splits=min(-(-slots // tile), most),
        num_warps=4 if dim * itemsize <= 256 else 8,
        interpret=interpret,
    )


def prepare(x: PrepareInputs, plan: PreparePlan) -> Prepared:
    """Launches the kernel."""
    programs = _programs(x, plan)
    [out] = pl.pallas_call(
        functools.partial(_body, plan=plan),
        grid=(sum(programs),),
        out_shape=[_outputs(x, plan)],
        compiler_params=plt.CompilerParams(num_warps=plan.num_warps, num_stages=2),
        interpret=plan.interpret,
        name="prepare",
    )(x)
    return out


def _programs(x: PrepareInputs, plan: PreparePlan) -> tuple[int, int, int]:
    """Programs for slots, for rotation and for block tables."""
    batch, count, heads, dim = x.query.shape
    kv_heads = plan.kv_heads
    group = heads // kv_heads
    blocks = -(-count * group // query_block(count, group))
    slots = batch * kv_heads * blocks * plan.slot_splits
    if not plan.pages_per_row:
        return slots, 0, 0
    rotate = -(-batch * count * heads // ROWS) * (power_of_two(dim) // COORDINATES)
    return slots, rotate, batch * -(-plan.pages_per_row // TABLE_BLOCK)


def _outputs(x: PrepareInputs, plan: PreparePlan) -> Prepared:
    batch, count, heads, dim = x.query.shape
    kv_heads = plan.kv_heads

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    out = Prepared()
    if plan.slot_splits:
        lead = (batch, kv_heads, plan.slot_splits, count * heads // kv_heads)
        out = dataclasses.replace(out, acc=floats(*lead, dim), peak=floats(*lead), total=floats(*lead))
    if plan.pages_per_row:
        out = dataclasses.replace(
            out,
            query=floats(*x.query.shape),
            bias=None if x.mean is None else floats(batch, count, heads),
            sketch=None if x.sketch is None else floats(*x.query.shape),
            table=jax.ShapeDtypeStruct((batch, plan.pages_per_row), jnp.int32),
            lengths=jax.ShapeDtypeStruct((batch,), jnp.int32),
            positions=jax.ShapeDtypeStruct((batch, count), jnp.int32),
        )
    return out


def _body(x: PrepareInputs, out: Prepared, *, plan: PreparePlan) -> None:
    program = pl.program_id(0)
    slots, rotate, tables = _programs(x, plan)
    if slots:
        # The longest programs come first.
        pl.when(program < slots)(lambda: _attend(x, out, program, plan))
    if rotate:
        here = (program >= slots) & (program < slots + rotate)
        pl.when(here)(lambda: _rotate(x, out, program - slots, plan))
    if tables:
        pl.when(program >= slots + rotate)(lambda: _write_table(x, out, program - slots - rotate, plan))


def _row(x: PrepareInputs, sequence: jax.Array) -> jax.Array:
    return sequence if x.rows is None else x.rows[sequence]


def _first_position(x: PrepareInputs, sequence: jax.Array, row: jax.Array) -> jax.Array:
    """Position of the first query of a sequence."""
    return x.length[row] - (x.query.shape[1] if x.counts is None else x.counts[sequence])


def _attend(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Attends over a share of the slots of a sequence and KV head."""
    count, heads, dim = x.query.shape[1:]
    kv_heads, slots = x.keys.shape[1:3]
    group, padded = heads // kv_heads, power_of_two(dim)
    size = query_block(count, group)
    split, rest = _divided(program, plan.slot_splits)
    block, rest = _divided(rest, -(-count * group // size))
    head, sequence = _divided(rest, kv_heads)
    row = _row(x, sequence)
    length, compressed = x.length[row], x.compressed[row]

    column = block * size + lax.broadcasted_iota(jnp.int32, (size,), 0)
    token, query_head = _token_and_head(column, head, group)
    shape = (size, padded)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = jnp.broadcast_to((column < count * group)[:, None], shape) & (channel < dim)
    index = [jnp.broadcast_to(i, shape) for i in (sequence, token[:, None], query_head[:, None])]
    query = plt.load(x.query.at[(*index, channel)], mask=mask, other=jnp.zeros((), x.query.dtype))

    used = lax.div(jnp.minimum(length, slots) + (plan.slot_tile - 1), jnp.int32(plan.slot_tile))
    share = lax.div(used + (plan.slot_splits - 1), jnp.int32(plan.slot_splits))
    begin = split * share
    acc, peak, total = attend_slots(
        query.astype(jnp.float32),
        _first_position(x, sequence, row) + token,
        x.keys,
        x.values,
        (row, head),
        (begin, jnp.minimum(begin + share, used)),
        (length, compressed),
        tile=plan.slot_tile,
        sinks=plan.sinks,
        options=plan.options,
        query_terms=TERMS.get(jnp.dtype(x.query.dtype).name, 3),
        interpret=plan.interpret,
    )
    at = [jnp.broadcast_to(i, shape) for i in (sequence, head, split, column[:, None])]
    plt.store(out.acc.at[(*at, channel)], acc, mask=mask)
    at = [jnp.broadcast_to(i, (size,)) for i in (sequence, head, split)]
    for ref, value in ((out.peak, peak), (out.total, total)):
        plt.store(ref.at[(*at, column)], value, mask=column < count * group)


def _rotate(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Rotates a block of queries to a block of coordinates."""
    batch, count, heads, dim = x.query.shape
    padded = power_of_two(dim)
    block, rest = _divided(program, padded // COORDINATES)
    first = rest * ROWS + lax.broadcasted_iota(jnp.int32, (ROWS,), 0)
    exists = first < batch * count * heads
    head, rest = _divided(first, heads)
    token, sequence = _divided(rest, count)

    shape = (ROWS, padded)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = jnp.broadcast_to(exists[:, None], shape) & (channel < dim)

    def at_channels(*index: jax.Array) -> tuple:
        return (*(jnp.broadcast_to(i[:, None], shape) for i in index), channel)

    query = plt.load(x.query.at[at_channels(sequence, token, head)], mask=mask, other=jnp.zeros((), x.query.dtype))
    query = query.astype(jnp.float32)
    if x.mean is not None:
        row = sequence if x.rows is None else plt.load(x.rows.at[sequence], mask=exists, other=0)
        kv_head = lax.div(head, jnp.full_like(head, heads // plan.kv_heads))
        mean, weight = (plt.load(ref.at[at_channels(row, kv_head)], mask=mask, other=1.0) for ref in (x.mean, x.weight))
        bias = jnp.sum(query * mean, axis=1) * plan.options.scale
        plt.store(out.bias.at[sequence, token, head], bias, mask=exists & (block == 0))
        query = query / weight

    def rotated(block: jax.Array) -> jax.Array:
        coordinate = block * COORDINATES + lax.broadcasted_iota(jnp.int32, (COORDINATES,), 0)
        channel = lax.broadcasted_iota(jnp.int32, (padded,), 0)
        assert x.basis is not None
        return float32_product(
            query, basis_tile(x.basis, channel, coordinate, channel_axis=0), interpret=plan.interpret
        )

    shape = (ROWS, COORDINATES)
    coordinate = block * COORDINATES + lax.broadcasted_iota(jnp.int32, (COORDINATES,), 0)
    index = [jnp.broadcast_to(i[:, None], shape) for i in (sequence, token, head)]
    at = (*index, jnp.broadcast_to(coordinate[None, :], shape))
    mask = exists[:, None] & (coordinate < dim)[None, :]
    plt.store(out.query.at[at], rotated(block), mask=mask)
    if x.sketch is None:
        return

    def sketched(i: jax.Array, sums: jax.Array) -> jax.Array:
        inner = i * COORDINATES + lax.broadcasted_iota(jnp.int32, (COORDINATES,), 0)
        square = (COORDINATES, COORDINATES)
        index = jnp.broadcast_to(coordinate[None, :], square), jnp.broadcast_to(inner[:, None], square)
        inside = (index[0] < dim) & (index[1] < dim)
        factors = plt.load(x.sketch.at[index], mask=inside, other=0.0)
        return sums + float32_product(rotated(i), factors, interpret=plan.interpret)

    sums = lax.fori_loop(0, padded // COORDINATES, sketched, jnp.zeros(shape, jnp.float32))
    plt.store(out.sketch.at[at], sums * plan.sketch_gain, mask=mask)


def _write_table(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Writes a run of a sequence's block table and, with the first, its length and the positions of its queries."""
    count = x.query.shape[1]
    block, sequence = _divided(program, -(-plan.pages_per_row // TABLE_BLOCK))
    row = _row(x, sequence)
    size = min(TABLE_BLOCK, power_of_two(plan.pages_per_row))
    page = block * TABLE_BLOCK + lax.broadcasted_iota(jnp.int32, (size,), 0)
    at = out.table.at[jnp.full_like(page, sequence), page]
    plt.store(at, row * plan.pages_per_row + page, mask=page < plan.pages_per_row)

    @pl.when(block == 0)
    def _() -> None:
        out.lengths[sequence] = x.compressed[row]
        token = lax.broadcasted_iota(jnp.int32, (power_of_two(count),), 0)
        position = _first_position(x, sequence, row) - plan.sinks + token
        plt.store(out.positions.at[jnp.full_like(token, sequence), token], position, mask=token < count)


def _divided(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Remainder and quotient of what is not negative."""
    divisor = jnp.full_like(x, by)
    return lax.rem(x, divisor), lax.div(x, divisor)


def _token_and_head(column: jax.Array, head: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """Query token and query head of each column of a KV head."""
    inner, token = _divided(column, group)
    return token, head * group + inner
