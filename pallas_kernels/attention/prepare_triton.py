"""The prepare kernel: every input of decode besides the pages, and attention over full-precision slots.

Its programs do four things side by side: attend over a run of full-precision slots; attend over the queries' own
tokens, if the cache does not hold them yet; rotate a block of queries, with the bias of centred keys and the sketch of
Prod keys; and write the block table of a sequence, the number of its tokens in pages and the positions of its queries.
The rotated basis begins here and ends in `merge_triton`; docs/decode_step.md draws all three launches.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.append.slots import first_page, page_at
from pallas_kernels.attention.full_precision_triton import attend_new, attend_slots, query_block, terms_of
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.prepare_arguments import Prepared, PrepareInputs, PreparePlan
from pallas_kernels.compat.device import H100_MULTIPROCESSORS
from pallas_kernels.numerics import INSTRUCTION_ROWS, power_of_two
from pallas_kernels.tiles.rotation_triton import apply_factors, channels_of, grid_of, load_signs

SKETCHED, TABLE_BLOCK = 16, 1024
"""Coordinates per program that sketches, entries per program that writes a block table."""

SLOT_PROGRAMS, ROTATE_PROGRAMS = H100_MULTIPROCESSORS * 2, 128
"""Programs to aim at for full-precision slots and for rotation: all run at once on an H100."""

SHORT = 4
"""Tiles of slots for which there are as many programs, however many sequences: such programs need no loop."""

MOST_SLOTS, LEAST_SLOTS = 64, 16
"""Slots that a tile may have; one tensor-core instruction contracts 16."""

TILE_CHANNELS = 64 * 128
"""Channels of the largest tile of bfloat16 slots or queries: as many as registers and shared memory hold."""

MOST_ROTATED = 4
"""Most queries that a program rotates."""

FOUR_WARP_BYTES = 256
"""Bytes of a full-precision key up to which a program has four warps, not eight."""


def prepare_plan(
    query_shape: tuple[int, ...],
    slots_shape: tuple[int, ...],
    dtype: Any,
    *,
    options: LogitOptions,
    sink_slots: int,
    pages_per_row: int,
    page_size: int,
    sketch_gain: float,
    interpret: bool,
) -> PreparePlan:
    """The plan for queries [b, t, h_q, d] and slots [rows, h_kv, slots, d] of a dtype; uint16 stands for bfloat16."""
    batch, count, heads, dim = query_shape
    kv_heads, slots = slots_shape[1:3]
    itemsize, bfloat16 = jnp.dtype(dtype).itemsize, jnp.dtype(dtype) == jnp.uint16
    largest = TILE_CHANNELS * 2 // (power_of_two(dim) * itemsize)
    tile = max(LEAST_SLOTS, min(MOST_SLOTS, largest, power_of_two(slots))) if slots else LEAST_SLOTS
    # Products of float32 cut all operands in two in registers: no more query rows than one instruction has.
    most_queries = TILE_CHANNELS // power_of_two(dim) if bfloat16 else INSTRUCTION_ROWS
    queries = query_block(count, heads // kv_heads, most_queries)
    blocks = -(-count * heads // kv_heads // queries)
    most = max(SHORT, SLOT_PROGRAMS // (batch * kv_heads * blocks))
    return PreparePlan(
        options=options,
        kv_heads=kv_heads,
        sink_slots=sink_slots,
        pages_per_row=pages_per_row,
        page_size=page_size,
        sketch_gain=sketch_gain,
        slot_tile=tile,
        slot_queries=queries,
        slot_splits=min(-(-slots // tile), most),
        rotated=min(MOST_ROTATED, power_of_two(max(1, batch * count * heads // ROTATE_PROGRAMS))),
        num_warps=4 if dim * (2 if bfloat16 else 4) <= FOUR_WARP_BYTES else 8,
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


def _programs(x: PrepareInputs, plan: PreparePlan) -> tuple[int, int, int, int]:
    """Programs for rotation, for slots, for new tokens and for block tables."""
    batch, count, heads, dim = x.query.shape
    kv_heads = plan.kv_heads
    group = heads // kv_heads
    blocks = batch * kv_heads * -(-count * group // plan.slot_queries)
    slots, new = blocks * plan.slot_splits, 0 if x.new_keys is None else blocks
    if not plan.pages_per_row:
        return 0, slots, new, 0
    rotate = -(-batch * count * heads // plan.rotated) * (1 if x.sketch is None else -(-dim // SKETCHED))
    return rotate, slots, new, batch * -(-plan.pages_per_row // TABLE_BLOCK)


def _outputs(x: PrepareInputs, plan: PreparePlan) -> Prepared:
    batch, count, heads, dim = x.query.shape
    kv_heads = plan.kv_heads

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    out = Prepared()
    if splits := plan.slot_splits + (x.new_keys is not None):
        lead = (batch, kv_heads, splits, count * heads // kv_heads)
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
    """The kernel body; the number of a program says which of the tasks it has. All arguments are references."""
    program = pl.program_id(0)
    # Rotations come first: their arithmetic hides behind the loads of the other tasks.
    tasks = _rotate, _attend, _attend_new, _write_table
    end = 0
    for task, programs in zip(tasks, _programs(x, plan), strict=True):
        begin, end = end, end + programs
        if programs:
            here = (program >= begin) & (program < end)

            @pl.when(here)
            def _(task: Any = task, begin: int = begin) -> None:
                task(x, out, program - begin, plan)


def _row(x: PrepareInputs, sequence: jax.Array) -> jax.Array:
    """Cache row of a sequence."""
    return sequence if x.rows is None else x.rows[sequence]


def _first_position(x: PrepareInputs, sequence: jax.Array, row: jax.Array) -> jax.Array:
    """Position of the first query of a sequence."""
    back = x.counts if x.back is None else x.back
    return x.length[row] - (x.query.shape[1] if back is None else back[sequence])


@dataclasses.dataclass(frozen=True)
class _QueryRows:
    """A block of query rows of a sequence and KV head, and which part of the keys it attends to.

    Attributes:
        query: float32 [queries, d padded].
        token: int32 [queries], query token of each row.
        column: int32 [queries], number of each row among those of the KV head.
        channel: int32 [queries, d padded].
        mask: bool [queries, d padded], whether the row and the channel exist.
        sequence: Sequence of the batch, a number.
        head: KV head, a number.
        part: Part of the keys, a number.
    """

    query: jax.Array
    token: jax.Array
    column: jax.Array
    channel: jax.Array
    mask: jax.Array
    sequence: jax.Array
    head: jax.Array
    part: jax.Array


def _query_rows(x: PrepareInputs, program: jax.Array, plan: PreparePlan, *, parts: int) -> _QueryRows:
    """The query rows of a program, of which each block has one program per part of the keys."""
    count, heads, dim = x.query.shape[1:]
    group, size = heads // plan.kv_heads, plan.slot_queries
    part, rest = _divided(program, parts)
    block, rest = _divided(rest, -(-count * group // size))
    head, sequence = _divided(rest, plan.kv_heads)
    column = block * size + lax.broadcasted_iota(jnp.int32, (size,), 0)  # [queries], query rows
    token, query_head = _token_and_head(column, head, group)  # [queries] each
    shape = (size, power_of_two(dim))
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)  # [queries, d padded], as are mask and query
    mask = jnp.broadcast_to((column < count * group)[:, None], shape) & (channel < dim)
    index = [jnp.broadcast_to(i, shape) for i in (sequence, token[:, None], query_head[:, None])]
    query = plt.load(x.query.at[(*index, channel)], mask=mask, other=jnp.zeros((), x.query.dtype))
    return _QueryRows(query.astype(jnp.float32), token, column, channel, mask, sequence, head, part)


def _attend(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Attends with a block of query rows over a share of the slots of a sequence and KV head."""
    slots = x.keys.shape[2]
    this = _query_rows(x, program, plan, parts=plan.slot_splits)
    row = _row(x, this.sequence)
    length, compressed = x.length[row], x.compressed[row]
    single = plan.slot_splits * plan.slot_tile >= slots
    used = lax.div(jnp.minimum(length, slots) + (plan.slot_tile - 1), jnp.int32(plan.slot_tile))
    share = lax.div(used + (plan.slot_splits - 1), jnp.int32(plan.slot_splits))
    begin = this.part if single else this.part * share
    state = attend_slots(
        this.query,
        _first_position(x, this.sequence, row) + this.token,
        x.keys,
        x.values,
        (row, this.head),
        (begin, jnp.minimum(begin + share, used)),
        (length, compressed),
        tile=plan.slot_tile,
        sink_slots=plan.sink_slots,
        options=plan.options,
        query_terms=terms_of(x.query.dtype),
        single=single,
        interpret=plan.interpret,
    )
    _store_split(out, this, this.part, state)


def _attend_new(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Attends with a block of query rows over the new tokens of a sequence and KV head."""
    count = x.query.shape[1]
    this = _query_rows(x, program, plan, parts=1)
    state = attend_new(
        this.query,
        this.token,
        (x.new_keys, x.new_values),
        (this.sequence, this.head),
        jnp.int32(count) if x.counts is None else x.counts[this.sequence],
        tile=max(LEAST_SLOTS, power_of_two(count)),
        options=plan.options,
        query_terms=terms_of(x.query.dtype),
        interpret=plan.interpret,
    )
    _store_split(out, this, jnp.int32(plan.slot_splits), state)


def _store_split(out: Prepared, this: _QueryRows, split: jax.Array, state: tuple[jax.Array, ...]) -> None:
    """Writes acc [queries, d padded], peak and total [queries] of a split."""
    shape, acc = this.mask.shape, state[0]
    at = [jnp.broadcast_to(i, shape) for i in (this.sequence, this.head, split, this.column[:, None])]
    plt.store(out.acc.at[(*at, this.channel)], acc, mask=this.mask)
    at = [jnp.broadcast_to(i, shape[:1]) for i in (this.sequence, this.head, split)]
    for ref, value in ((out.peak, state[1]), (out.total, state[2])):
        plt.store(ref.at[(*at, this.column)], value, mask=this.column < out.acc.shape[3])


def _rotate(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Rotates a block of queries; with a sketch, one program per block of the sketch's coordinates repeats this."""
    batch, count, heads, dim = x.query.shape
    block, rest = _divided(program, 1 if x.sketch is None else -(-dim // SKETCHED))
    query = rest * plan.rotated + lax.broadcasted_iota(jnp.int32, (plan.rotated,), 0)  # [rotated]
    exists = query < batch * count * heads  # [rotated]
    head, rest = _divided(query, heads)  # [rotated] each
    token, sequence = _divided(rest, count)  # [rotated] each
    row = sequence
    if x.rows is not None and x.mean is not None:
        row = plt.load(x.rows.at[sequence], mask=query < batch * count * heads, other=0)
    kv_head = lax.div(head, jnp.full_like(head, heads // plan.kv_heads))
    assert x.basis is not None
    coordinate = block * SKETCHED + lax.broadcasted_iota(jnp.int32, (SKETCHED,), 0)  # [coordinates]
    sketch = jnp.zeros((plan.rotated, SKETCHED if x.sketch is not None else 1), jnp.float32)
    bias, start = jnp.zeros((plan.rotated,), jnp.float32), 0
    for index, segment in enumerate(x.basis.segments):
        i, j, valid = grid_of(segment)  # [n, k] each
        place = i * segment.inner_size + j  # [n, k]
        shape = (place.shape[0], plan.rotated, place.shape[1])
        channel = jnp.broadcast_to(channels_of(x.basis, index, place, valid)[:, None], shape)  # [n, rotated, k]
        mask = jnp.broadcast_to(exists[None, :, None] & valid[:, None], shape)  # [n, rotated, k]

        def load(ref: Any, *lead: jax.Array, at: jax.Array = channel, mask: jax.Array = mask) -> jax.Array:
            lead = tuple(jnp.broadcast_to(k[None, :, None], at.shape) for k in lead)
            return plt.load(ref.at[(*lead, at)], mask=mask, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)

        values = load(x.query, sequence, token, head)  # [n, rotated, k]
        if x.mean is not None:
            mean, weight = (load(ref, row, kv_head) for ref in (x.mean, x.weight))
            bias = bias + jnp.sum(jnp.sum(values * mean, axis=0), axis=1)  # [rotated]
            values = values / jnp.where(mask, weight, 1.0)
        signs = load_signs(segment, place, valid)  # [n, k]
        values = values if signs is None else values * signs[:, None]

        def consume(
            place: jax.Array, valid: jax.Array, y: jax.Array, sketch: jax.Array, start: int = start
        ) -> jax.Array:
            # place, valid [m, k]; y [rotated, m, k]; sketch [rotated, coordinates]
            at = [jnp.broadcast_to(k[:, None, None], y.shape) for k in (sequence, token, head)]
            at.append(jnp.broadcast_to(start + place[None], y.shape))
            mask = jnp.broadcast_to(exists[:, None, None] & valid[None] & (block == 0), y.shape)
            plt.store(out.query.at[tuple(at)], y, mask=mask)
            return sketch if x.sketch is None else sketch + _sketched(x.sketch, coordinate, place, valid, y)

        sketch = apply_factors(segment, values, consume, sketch, inverse=False)
        start += segment.dim
    if x.mean is not None:
        at = out.bias.at[sequence, token, head]
        plt.store(at, bias * plan.options.scale, mask=exists & (block == 0))
    if x.sketch is not None:
        at = [jnp.broadcast_to(k[:, None], sketch.shape) for k in (sequence, token, head)]
        at.append(jnp.broadcast_to(coordinate[None, :], sketch.shape))
        plt.store(
            out.sketch.at[tuple(at)], sketch * plan.sketch_gain, mask=exists[:, None] & (coordinate < dim)[None, :]
        )


def _sketched(matrix: Any, coordinate: jax.Array, place: jax.Array, valid: jax.Array, y: jax.Array) -> jax.Array:
    """Contribution [rotated, coordinates] to the sketch by rotated queries y [rotated, m, k] at places [m, k]."""
    shape = (coordinate.shape[0], *place.shape)
    mask = jnp.broadcast_to((coordinate < matrix.shape[0])[:, None, None] & valid[None], shape)
    at = [jnp.broadcast_to(k, shape) for k in (coordinate[:, None, None], place[None])]
    factors = plt.load(matrix.at[tuple(at)], mask=mask, other=0.0)  # [coordinates, m, k]
    return jnp.sum(jnp.sum(y[:, None] * factors[None], axis=3), axis=2)


def _write_table(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Writes a run of a sequence's block table; the first run's program also writes its length and query positions."""
    count = x.query.shape[1]
    block, sequence = _divided(program, -(-plan.pages_per_row // TABLE_BLOCK))
    row = _row(x, sequence)
    size = min(TABLE_BLOCK, power_of_two(plan.pages_per_row))
    entry = block * TABLE_BLOCK + lax.broadcasted_iota(jnp.int32, (size,), 0)  # [entries]
    compressed = x.compressed[row]
    first = first_page(compressed, pages_per_row=plan.pages_per_row, page_size=plan.page_size)
    at = out.table.at[jnp.full_like(entry, sequence), entry]
    page = page_at(first + entry, row, pages_per_row=plan.pages_per_row)  # [entries]
    plt.store(at, page, mask=entry < plan.pages_per_row)

    @pl.when(block == 0)
    def _() -> None:
        overwritten = first * plan.page_size
        out.lengths[sequence] = compressed - overwritten
        token = lax.broadcasted_iota(jnp.int32, (power_of_two(count),), 0)  # [t padded]
        position = _first_position(x, sequence, row) - plan.sink_slots - overwritten + token
        plt.store(out.positions.at[jnp.full_like(token, sequence), token], position, mask=token < count)


def _divided(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Remainder and quotient of integers that are not negative."""
    divisor = jnp.full_like(x, by)
    return lax.rem(x, divisor), lax.div(x, divisor)


def _token_and_head(column: jax.Array, head: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """Query token and query head of each query row [queries] of a KV head."""
    inner, token = _divided(column, group)
    return token, head * group + inner
