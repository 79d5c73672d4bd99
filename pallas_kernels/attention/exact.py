"""Attention over tokens in full precision: the slots of a cache, and new tokens that it does not hold yet.

It is a task of some programs of a launch: of decode, where their few warps have the registers (`is_light`) and they run
beside all programs for the pages (`decode.launch_triton.free_programs`); else of prepare. Where programs for the pages
have to wait for these, a step of an 8B shape on an H200 takes 4 % longer for 2 x 8,192 tokens, 7 % for 1 x 131,072 and
15 % for 8 x 32,768.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.full_precision_triton import (
    Slots,
    attend_slots,
    attend_tile,
    no_keys,
    query_block,
    terms_of,
)
from pallas_kernels.attention.merge_triton import Splits
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.compat.device import H100_MULTIPROCESSORS
from pallas_kernels.format import CodebookFormat, VectorFormat
from pallas_kernels.layer.heads import Heads, JointHeads, load_query, load_token
from pallas_kernels.numerics import INSTRUCTION_ROWS, power_of_two
from pallas_kernels.pytree import pytree

PROGRAMS = H100_MULTIPROCESSORS * 2
"""Programs to aim at for slots: all run at once on an H100."""

SHORT = 4
"""Tiles of slots for which there are as many programs, however many sequences: such programs need no loop."""

MOST_SLOTS, LEAST_SLOTS = 64, 16
"""Slots that a tile may have; one tensor-core instruction contracts 16."""

TILE_CHANNELS, TILE_CHANNELS_PER_WARP = 64 * 128, 16 * 128
"""Channels of the largest tile of bfloat16 slots or queries: as many as registers and shared memory hold."""

NARROW = (64, 128)
"""Head dims for which programs of decode have the registers for slots: narrow, and without masks of channels."""


@pytree
class ExactInputs:
    """Queries, and tokens in full precision; arrays or references, None where a field does not apply.

    Attributes:
        query: [b, t, h_q, d] of any float type.
        rows: int32 [b], cache row of each sequence; None for all in order.
        counts: int32 [b], query tokens of each sequence; None for t.
        back: int32 [b], tokens from the first query to the end of the cache row: 0 if the queries follow the row's
            tokens; None for `counts`, if they belong to its last tokens.
        length: int32 [rows], tokens of each cache row.
        compressed: int32 [rows], tokens that left the ring for the pages.
        keys: [rows, h_kv, slots, d] or, with a table, [tokens, h_kv, d], full-precision keys; uint16 are the bits of
            bfloat16.
        values: [rows, h_kv, slots, d], full-precision values, of the type of the keys.
        new_keys: [b, t, h_kv, d], keys of the queries' own tokens, of any float type, if the cache does not hold them
            yet.
        new_values: [b, t, h_kv, d], their values.
        joint: What queries, new keys and new values are made of, in place of these three.
        table: int32 [b, n], block of the full-precision tokens that each run of block_size slots of a sequence is: its
            first block, if there are slots for it, then those behind its tokens in pages. None for cache rows.
        begin: int32 [b], with a table, tokens before those in pages: those of the first block, or 0.
        block_size: Tokens per block of the table (static).
    """

    query: Any = None
    rows: Any = None
    counts: Any = None
    back: Any = None
    length: Any = None
    compressed: Any = None
    keys: Any = None
    values: Any = None
    new_keys: Any = None
    new_values: Any = None
    joint: JointHeads | None = None
    table: Any = None
    begin: Any = None
    block_size: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def slots(self) -> int:
        """Full-precision slots of a sequence."""
        if self.keys is None:
            return 0
        return self.keys.shape[2] if self.table is None else self.table.shape[1] * self.block_size

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        """Shape of the queries, [b, t, h_q, d]."""
        return self.query.shape if self.joint is None else self.joint.query_shape

    @property
    def query_dtype(self) -> Any:
        """Type of the queries."""
        return self.query.dtype if self.joint is None else self.joint.product.dtype

    def with_heads(self, heads: Heads | None) -> "ExactInputs":
        """The inputs with the heads that the joint product made, if there is one."""
        if heads is None:
            return self
        return dataclasses.replace(self, query=heads.query, new_keys=heads.key, new_values=heads.value, joint=None)

    def row(self, sequence: jax.Array) -> jax.Array:
        """Cache row of a sequence, of references."""
        return sequence if self.rows is None else self.rows[sequence]


@dataclasses.dataclass(frozen=True)
class ExactPlan:
    """Static configuration of the task.

    Attributes:
        options: Logit options.
        shape: Shape of the queries, [b, t, h_q, d].
        kv_heads: KV heads.
        sink_slots: Full-precision slots before the ring, one per sink token.
        tile: Full-precision slots per step.
        queries: Query rows of a KV head that a program attends with.
        splits: Programs that share the slots of a sequence and KV head; 0 without slots.
        new: Whether there are new tokens, for which there is one program more.
        interpret: Whether the kernel runs as jnp.
    """

    options: LogitOptions
    shape: tuple[int, int, int, int]
    kv_heads: int
    sink_slots: int
    tile: int
    queries: int
    splits: int
    new: bool
    interpret: bool

    @property
    def query_rows(self) -> int:
        """Query rows per KV head: query tokens times query heads."""
        return self.shape[1] * self.shape[2] // self.kv_heads

    @property
    def parts(self) -> int:
        """Parts of the keys: each has a program per block of query rows, and gives one split."""
        return self.splits + self.new

    @property
    def blocks(self) -> int:
        """Blocks of query rows per KV head."""
        return -(-self.query_rows // self.queries)

    @property
    def programs(self) -> int:
        """Programs per sequence and KV head."""
        return self.parts * self.blocks

    def outputs(self) -> Splits:
        """Shapes of what the task writes: the splits of the slots, then one of new tokens."""
        batch, _, _, dim = self.shape
        lead = (batch, self.kv_heads, self.parts, self.query_rows)
        shapes = (*lead, dim), lead, lead
        return Splits(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def exact_plan(
    x: ExactInputs,
    stored_dtype: Any,
    *,
    kv_heads: int,
    options: LogitOptions,
    sink_slots: int,
    num_warps: int,
    interpret: bool,
) -> ExactPlan | None:
    """The plan of programs of some warps; None if there are no tokens in full precision.

    Args:
        x: Queries, slots and new tokens.
        stored_dtype: Type of full-precision slots, uint16 for bfloat16, where there may be none.
        kv_heads: KV heads.
        options: Logit options.
        sink_slots: Full-precision slots before the ring.
        num_warps: Warps per program.
        interpret: Whether the kernel runs as jnp.
    """
    batch, count, heads, dim = x.query_shape
    slots, new = x.slots, x.new_keys is not None or x.joint is not None
    if not slots and not new:
        return None
    itemsize, bfloat16 = jnp.dtype(stored_dtype).itemsize, jnp.dtype(stored_dtype) == jnp.uint16
    channels = min(TILE_CHANNELS, TILE_CHANNELS_PER_WARP * num_warps)
    largest = channels * 2 // (power_of_two(dim) * itemsize)
    tile = max(LEAST_SLOTS, min(MOST_SLOTS, largest, power_of_two(slots))) if slots else LEAST_SLOTS
    # Products of float32 cut all operands in two in registers: no more query rows than one instruction has.
    most_queries = channels // power_of_two(dim) if bfloat16 else INSTRUCTION_ROWS
    queries = query_block(count, heads // kv_heads, most_queries)
    blocks = -(-count * heads // kv_heads // queries)
    most = max(SHORT * MOST_SLOTS // tile, PROGRAMS // (batch * kv_heads * blocks))
    return ExactPlan(
        options=options,
        shape=(batch, count, heads, dim),
        kv_heads=kv_heads,
        sink_slots=sink_slots,
        tile=tile,
        queries=queries,
        splits=min(-(-slots // tile), most),
        new=new,
        interpret=interpret,
    )


def is_light(query_dtype: Any, stored_dtype: Any, dim: int, key: VectorFormat, value: VectorFormat) -> bool:
    """Whether programs of decode have the registers for the task.

    Args:
        query_dtype: Type of the queries: only bfloat16 takes one product per tile.
        stored_dtype: Type of full-precision slots: only uint16, the bits of bfloat16, is narrow enough.
        dim: Head dim.
        key: Format of compressed keys; a sketch takes registers of its own.
        value: Format of compressed values; several scales per token do, too.
    """
    narrow = terms_of(query_dtype) == 1 and jnp.dtype(stored_dtype) == jnp.uint16 and dim in NARROW
    return narrow and isinstance(key, CodebookFormat) and not key.residual and isinstance(value, CodebookFormat)


@dataclasses.dataclass(frozen=True)
class _QueryRows:
    """A block of query rows of a sequence and KV head.

    Attributes:
        query: float32 [queries, d padded].
        token: int32 [queries], query token of each row.
        column: int32 [queries], number of each row among those of the KV head.
        channel: int32 [queries, d padded].
        mask: bool [queries, d padded], whether the row and the channel exist.
        sequence: Sequence of the batch, a number.
        head: KV head, a number.
    """

    query: jax.Array
    token: jax.Array
    column: jax.Array
    channel: jax.Array
    mask: jax.Array
    sequence: jax.Array
    head: jax.Array


def attend_exact(
    x: ExactInputs, out: Splits, program: jax.Array, sequence: jax.Array, head: jax.Array, plan: ExactPlan
) -> None:
    """The task of one program.

    Args:
        x: References.
        out: References, see `ExactPlan.outputs`.
        program: Number of the program among those of the sequence and KV head.
        sequence: Sequence of the batch.
        head: KV head.
        plan: The plan.
    """
    part, block = divided(program, plan.parts)
    if not plan.new:
        attend_slots_part(x, out, part, block, sequence, head, plan)
    elif not plan.splits:
        attend_new_part(x, out, block, sequence, head, plan)
    else:
        pl.when(part < plan.splits)(lambda: attend_slots_part(x, out, part, block, sequence, head, plan))
        pl.when(part == plan.splits)(lambda: attend_new_part(x, out, block, sequence, head, plan))


def _query_rows(x: ExactInputs, block: jax.Array, sequence: jax.Array, head: jax.Array, plan: ExactPlan) -> _QueryRows:
    group, dim = plan.shape[2] // plan.kv_heads, plan.shape[3]
    column = block * plan.queries + lax.broadcasted_iota(jnp.int32, (plan.queries,), 0)  # [queries], query rows
    inner, token = divided(column, group)  # [queries] each
    shape = (plan.queries, power_of_two(dim))
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)  # [queries, d padded], as are mask and query
    mask = jnp.broadcast_to((column < plan.query_rows)[:, None], shape) & (channel < dim)
    where = sequence, token[:, None], (head * group + inner)[:, None]
    where = tuple(jnp.broadcast_to(i, (plan.queries, 1)) for i in where)
    query = load_queries(x, where, channel, exists=(column < plan.query_rows)[:, None], mask=mask)
    return _QueryRows(query, token, column, channel, mask, sequence, head)


def attend_slots_part(
    x: ExactInputs,
    out: Splits,
    part: jax.Array,
    block: jax.Array,
    sequence: jax.Array,
    head: jax.Array,
    plan: ExactPlan,
) -> None:
    """Attends with a block of query rows over a part of the slots of a sequence and KV head, and writes that split."""
    this = _query_rows(x, block, sequence, head, plan)
    row = x.row(this.sequence)
    counters = x.length[row], x.compressed[row], None if x.begin is None else x.begin[row]
    slots = Slots(x, row, this.head, plan.sink_slots, *counters)
    single = plan.splits * plan.tile >= x.slots
    used = lax.div(slots.used + (plan.tile - 1), jnp.int32(plan.tile))
    share = lax.div(used + (plan.splits - 1), jnp.int32(plan.splits))
    begin = part if single else part * share
    state = attend_slots(
        this.query,
        first_position(x, plan.shape[1], this.sequence, row) + this.token,
        slots,
        (begin, jnp.minimum(begin + share, used)),
        tile=plan.tile,
        options=plan.options,
        query_terms=terms_of(x.query_dtype),
        single=single,
        interpret=plan.interpret,
    )
    _store_split(out, this, part, state)


def attend_new_part(
    x: ExactInputs, out: Splits, block: jax.Array, sequence: jax.Array, head: jax.Array, plan: ExactPlan
) -> None:
    """Attends with a block of query rows over the new tokens of a sequence and KV head, and writes the last split."""
    this = _query_rows(x, block, sequence, head, plan)
    count, dim = plan.shape[1], plan.shape[3]
    shape = (max(LEAST_SLOTS, power_of_two(count)), power_of_two(dim))
    token = lax.broadcasted_iota(jnp.int32, shape[:1], 0)  # [tile]
    # Tokens behind those that exist may hold NaN.
    exists = token < (jnp.int32(count) if x.counts is None else x.counts[this.sequence])  # [tile]
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)  # [tile, d padded], as is the mask
    mask = jnp.broadcast_to(exists[:, None], shape) & (channel < dim)
    where = tuple(jnp.broadcast_to(i, (shape[0], 1)) for i in (this.sequence, token[:, None], this.head))
    if x.joint is not None:
        new = load_token(x.joint, where, channel, exists=exists[:, None], mask=mask)
    else:
        at = (*(jnp.broadcast_to(i, shape) for i in where), channel)
        new = tuple(
            plt.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype)) for ref in (x.new_keys, x.new_values)
        )
    state = attend_tile(
        no_keys(this.query),
        this.query,
        (new[0], new[1]),
        (token, exists),
        this.token,
        plan.options,
        query_terms=terms_of(x.query_dtype),
        interpret=plan.interpret,
    )
    _store_split(out, this, jnp.int32(plan.splits), state)


def load_queries(
    x: ExactInputs, where: tuple[jax.Array, ...], channel: jax.Array, *, exists: jax.Array, mask: jax.Array
) -> jax.Array:
    """Channels of queries, in a kernel.

    Args:
        x: References.
        where: Sequence, token and query head, of shapes that broadcast to that of the channels, with 1 for each axis of
            channels.
        channel: int32 [...], channels.
        exists: Whether each query exists, of the shape of the head numbers.
        mask: bool [...], which channels of queries that exist to load; the others are zero.

    Returns:
        float32 [...].
    """
    if x.joint is not None:
        return load_query(x.joint, where, channel, exists=exists, mask=mask).astype(jnp.float32)
    at = (*(jnp.broadcast_to(i, channel.shape) for i in where), channel)
    return plt.load(x.query.at[at], mask=mask, other=jnp.zeros((), x.query.dtype)).astype(jnp.float32)


def _store_split(out: Splits, this: _QueryRows, split: jax.Array, state: tuple[jax.Array, ...]) -> None:
    """Writes acc [queries, d padded], peak and total [queries] of a split."""
    shape, acc = this.mask.shape, state[0]
    at = [jnp.broadcast_to(i, shape) for i in (this.sequence, this.head, split, this.column[:, None])]
    plt.store(out.acc.at[(*at, this.channel)], acc, mask=this.mask)
    at = [jnp.broadcast_to(i, shape[:1]) for i in (this.sequence, this.head, split)]
    for ref, value in ((out.peak, state[1]), (out.total, state[2])):
        plt.store(ref.at[(*at, this.column)], value, mask=this.column < out.acc.shape[3])


def first_position(x: ExactInputs, count: int, sequence: jax.Array, row: jax.Array) -> jax.Array:
    """Position of the first of `count` query tokens of a sequence, whose cache row is given."""
    back = x.counts if x.back is None else x.back
    return x.length[row] - (count if back is None else back[sequence])


def divided(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Remainder and quotient of integers that are not negative."""
    divisor = jnp.full_like(x, by)
    return lax.rem(x, divisor), lax.div(x, divisor)
