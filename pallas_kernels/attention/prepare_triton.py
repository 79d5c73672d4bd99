"""The prepare kernel: every input of decode besides the pages.

Its programs do up to four things side by side. They rotate a block of queries, with the bias of centred keys and the
sketch of Prod keys; write the block table of a sequence, the number of its tokens in pages and the positions of its
queries; split the product of a decoder layer's joined projections into heads, where there are no queries yet; and
attend over tokens in full precision, where decode does not. The rotated basis begins here and ends in `merge_triton`;
docs/decode_step.md draws all three launches.
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
from pallas_kernels.attention.exact import (
    ExactPlan,
    attend_new_part,
    attend_slots_part,
    divided,
    first_position,
    load_queries,
)
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.prepare_arguments import Prepared, PrepareInputs, PreparePlan
from pallas_kernels.layer.heads import Heads, move_heads
from pallas_kernels.numerics import power_of_two
from pallas_kernels.tiles.rotation_triton import apply_factors, channels_of, grid_of, load_signs

SKETCHED, TABLE_BLOCK = 16, 1024
"""Coordinates per program that sketches, entries per program that writes a block table."""

ROTATE_PROGRAMS = 128
"""Programs to aim at for rotation: all run at once on an H100."""

MOST_ROTATED = 4
"""Most queries that a program rotates."""

FOUR_WARP_BYTES = 256
"""Bytes of a full-precision key up to which a program has four warps, not eight."""


def num_warps_for(dim: int, stored_dtype: Any) -> int:
    """Warps per program, for full-precision slots of a dtype, where uint16 stands for bfloat16."""
    itemsize = 2 if jnp.dtype(stored_dtype) == jnp.uint16 else 4  # what products take
    return 4 if dim * itemsize <= FOUR_WARP_BYTES else 8


def prepare_plan(
    shape: tuple[int, int, int, int],
    exact: ExactPlan | None,
    *,
    options: LogitOptions,
    kv_heads: int,
    sink_slots: int,
    pages_per_row: int,
    page_size: int,
    sketch_gain: float,
    num_warps: int,
    interpret: bool,
) -> PreparePlan:
    """The plan for queries [b, t, h_q, d]; `exact` is how programs attend over tokens in full precision, if they do."""
    batch, count, heads, _ = shape
    return PreparePlan(
        options=options,
        shape=shape,
        kv_heads=kv_heads,
        sink_slots=sink_slots,
        pages_per_row=pages_per_row,
        page_size=page_size,
        sketch_gain=sketch_gain,
        exact=exact,
        rotated=min(MOST_ROTATED, power_of_two(max(1, batch * count * heads // ROTATE_PROGRAMS))),
        num_warps=num_warps,
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


def _programs(x: PrepareInputs, plan: PreparePlan) -> tuple[int, int, int, int, int]:
    """Programs for rotation, for full-precision slots, for new tokens, for heads and for block tables."""
    batch, count, heads, dim = plan.shape
    slots = new = 0
    if (exact := plan.exact) is not None:
        slots, new = (batch * plan.kv_heads * exact.blocks * parts for parts in (exact.splits, exact.new))
    if not plan.pages_per_row:
        return 0, slots, new, 0, 0
    rotate = -(-batch * count * heads // plan.rotated) * (1 if x.sketch is None else -(-dim // SKETCHED))
    split = 0 if x.tokens.joint is None else batch * count * plan.kv_heads
    return rotate, slots, new, split, batch * -(-plan.pages_per_row // TABLE_BLOCK)


def _outputs(x: PrepareInputs, plan: PreparePlan) -> Prepared:
    batch, count, heads, dim = plan.shape
    shape = jax.ShapeDtypeStruct
    out = Prepared(exact=None if plan.exact is None else plan.exact.outputs())
    if plan.pages_per_row:
        rotated = shape(plan.shape, jnp.float32)
        out = dataclasses.replace(
            out,
            query=rotated,
            bias=None if x.mean is None else shape((batch, count, heads), jnp.float32),
            sketch=None if x.sketch is None else rotated,
            table=shape((batch, plan.pages_per_row), jnp.int32),
            lengths=shape((batch,), jnp.int32),
            positions=shape((batch, count), jnp.int32),
        )
    if x.tokens.joint is not None:
        dtype = x.tokens.query_dtype
        token = shape((batch, count, plan.kv_heads, dim), dtype)
        out = dataclasses.replace(out, heads=Heads(shape(plan.shape, dtype), token, token))
    return out


def _body(x: PrepareInputs, out: Prepared, *, plan: PreparePlan) -> None:
    """The kernel body; the number of a program says which of the tasks it has. All arguments are references."""
    program = pl.program_id(0)
    # Rotations come first: their arithmetic hides behind the loads of the other tasks. Programs for slots, the longest
    # where all tokens have slots, come in a row: they then spread evenly over multiprocessors.
    tasks = _rotate, _attend_slots, _attend_new, _split, _write_table
    end = 0
    for task, programs in zip(tasks, _programs(x, plan), strict=True):
        begin, end = end, end + programs
        if programs:
            here = (program >= begin) & (program < end)

            @pl.when(here)
            def _(task: Any = task, begin: int = begin) -> None:
                task(x, out, program - begin, plan)


def _attend_slots(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Attends over a part of the full-precision slots."""
    assert plan.exact is not None and out.exact is not None
    part, rest = divided(program, plan.exact.splits)
    block, rest = divided(rest, plan.exact.blocks)
    head, sequence = divided(rest, plan.kv_heads)
    attend_slots_part(x.tokens, out.exact, part, block, sequence, head, plan.exact)


def _attend_new(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Attends over new tokens."""
    assert plan.exact is not None and out.exact is not None
    block, rest = divided(program, plan.exact.blocks)
    head, sequence = divided(rest, plan.kv_heads)
    attend_new_part(x.tokens, out.exact, block, sequence, head, plan.exact)


def _split(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Writes the heads of a KV head of a token."""
    assert x.tokens.joint is not None and out.heads is not None
    head, rest = divided(program, plan.kv_heads)
    token, sequence = divided(rest, plan.shape[1])
    move_heads(x.tokens.joint, out.heads, (sequence, token, head))


def _rotate(x: PrepareInputs, out: Prepared, program: jax.Array, plan: PreparePlan) -> None:
    """Rotates a block of queries; with a sketch, one program per block of the sketch's coordinates repeats this."""
    batch, count, heads, dim = plan.shape
    block, rest = divided(program, 1 if x.sketch is None else -(-dim // SKETCHED))
    query = rest * plan.rotated + lax.broadcasted_iota(jnp.int32, (plan.rotated,), 0)  # [rotated]
    exists = query < batch * count * heads  # [rotated]
    head, rest = divided(query, heads)  # [rotated] each
    token, sequence = divided(rest, count)  # [rotated] each
    row, rows = sequence, x.tokens.rows
    if rows is not None and x.mean is not None:
        row = plt.load(rows.at[sequence], mask=exists, other=0)
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

        def load(ref: Any, at: jax.Array = channel, mask: jax.Array = mask) -> jax.Array:
            lead = tuple(jnp.broadcast_to(k[None, :, None], at.shape) for k in (row, kv_head))
            return plt.load(ref.at[(*lead, at)], mask=mask, other=0.0)

        *where, some = (k[None, :, None] for k in (sequence, token, head, exists))
        values = load_queries(x.tokens, tuple(where), channel, exists=some, mask=mask)  # [n, rotated, k]
        if x.mean is not None:
            mean, weight = load(x.mean), load(x.weight)
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
    count = plan.shape[1]
    block, sequence = divided(program, -(-plan.pages_per_row // TABLE_BLOCK))
    row = x.tokens.row(sequence)
    size = min(TABLE_BLOCK, power_of_two(plan.pages_per_row))
    entry = block * TABLE_BLOCK + lax.broadcasted_iota(jnp.int32, (size,), 0)  # [entries]
    compressed = x.tokens.compressed[row]
    first = first_page(compressed, pages_per_row=plan.pages_per_row, page_size=plan.page_size)
    at = out.table.at[jnp.full_like(entry, sequence), entry]
    page = page_at(first + entry, row, pages_per_row=plan.pages_per_row)  # [entries]
    plt.store(at, page, mask=entry < plan.pages_per_row)

    @pl.when(block == 0)
    def _() -> None:
        overwritten = first * plan.page_size
        out.lengths[sequence] = compressed - overwritten
        token = lax.broadcasted_iota(jnp.int32, (power_of_two(count),), 0)  # [t padded]
        before = plan.sink_slots if x.tokens.begin is None else x.tokens.begin[sequence]
        position = first_position(x.tokens, count, sequence, row) - before - overwritten + token
        plt.store(out.positions.at[jnp.full_like(token, sequence), token], position, mask=token < count)
