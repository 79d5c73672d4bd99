"""The kernel that observes queries and fixes the key statistics of cache rows, in place, for chunks of a few tokens.

If the statistics of a row are fixed already, as they are for all but its first tokens, its program ends at once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.append.window_triton import existing_row
from pallas_kernels.numerics import power_of_two
from pallas_kernels.pytree import pytree
from pallas_kernels.tiles.intrinsics_triton import exp2, log2

TILE = 16
"""Tokens of the window per step, and most tokens of a chunk."""


@dataclasses.dataclass(frozen=True)
class StatisticsPlan:
    """Static configuration of the kernel.

    Attributes:
        sink_slots: Full-precision slots for the first tokens, which statistics leave out.
        max_tokens: Tokens that a cache row can hold.
        center: Whether means are fixed.
        smooth: Whether weights are fixed.
        least_tokens: Least keys of a row for a mean and a weight; with fewer the row keeps its zero mean and unit
            weight for good.
        balance: Power of the ratio of queries to keys.
        floor: Least spread of a channel, relative to the mean spread of its head.
        equal: Spread of a head, relative to its size, below which all channels have equal weight.
        interpret: Whether the kernel runs as jnp.
    """

    sink_slots: int
    max_tokens: int
    center: bool
    smooth: bool
    least_tokens: int
    balance: float
    floor: float
    equal: float
    interpret: bool


@pytree
class Observed:
    """Inputs of the kernel; arrays or references.

    Attributes:
        query: [b, t, h_q, d], queries of the new tokens; None if they are not known.
        keys: [b, t, h_kv, d], new keys of the window's type.
        counts: int32 [b], how many tokens of each chunk exist.
        rows: int32 [b], cache row of each chunk, all different.
        window: [rows, h_kv, slots, d], full-precision keys; uint16 are the bits of bfloat16; None without slots.
        length: int32 [rows], tokens of each cache row before the chunk.
        compressed: int32 [rows], tokens in pages.
    """

    query: Any
    keys: Any
    counts: Any
    rows: Any
    window: Any
    length: Any
    compressed: Any

    @property
    def slots(self) -> int:
        """Full-precision slots per cache row."""
        return 0 if self.window is None else self.window.shape[2]


def update_statistics(x: Observed, statistics: Any, plan: StatisticsPlan) -> Any:
    """Updates the statistics of the cache rows that get a chunk, before the chunk is appended.

    Args:
        x: The chunks and the window.
        statistics: A `tq_jax.statistics.KeyStatistics`: float32 `query_power`, `mean` and `weight` [rows, h_kv, d],
            float32 `query_count` [rows] and `ready` [rows].
        plan: Static configuration.

    Returns:
        The statistics of all rows.
    """
    leaves = jax.tree.leaves(statistics)
    first = len(jax.tree.leaves(x))
    [new] = pl.pallas_call(
        functools.partial(_update, plan=plan),
        grid=(x.rows.shape[0],),
        out_shape=[jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), statistics)],
        input_output_aliases={first + i: i for i in range(len(leaves))},
        compiler_params=plt.CompilerParams(num_warps=4 if x.keys.shape[3] <= 128 else 8, num_stages=1),
        interpret=plan.interpret,
        name="statistics",
    )(x, statistics)
    return new


def _update(x: Observed, old: Any, out: Any, *, plan: StatisticsPlan) -> None:
    """The kernel body; one program per chunk. `old` and `out` are the same statistics, as references."""
    index = pl.program_id(0)
    row, exists = existing_row(x.rows[index], x.length.shape[0])
    before, count = x.length[row], x.counts[index]
    after = before + jnp.where(before + count <= plan.max_tokens, count, 0)
    leaves = after - x.slots > x.compressed[row]

    @pl.when(exists & jnp.logical_not(old.ready[row]))
    def _() -> None:
        queries = old.query_count[row]
        if x.query is not None:
            queries += (after - before).astype(jnp.float32)

        def head(number: jax.Array, _: None) -> None:
            power = _observe(x, old, index, row, number, after - before)  # [d padded]
            _store(out.query_power, row, number, power)

            @pl.when(leaves)
            def _() -> None:
                _fix(x, old, out, (index, row, number), (before, after), power, queries, plan)

        lax.fori_loop(0, x.keys.shape[2], head, None)
        out.query_count[row] = queries

        @pl.when(leaves)
        def _() -> None:
            out.ready[row] = jnp.ones((), out.ready.dtype)


def _channels(dim: int) -> jax.Array:
    """Numbers of channels, [d padded]."""
    return lax.broadcasted_iota(jnp.int32, (power_of_two(dim),), 0)


def _load(ref: Any, row: jax.Array, head: jax.Array) -> jax.Array:
    """Channels [d padded] of a row and head of ref [rows, h_kv, d]."""
    channel = _channels(ref.shape[2])
    at = (jnp.full_like(channel, row), jnp.full_like(channel, head), channel)
    return plt.load(ref.at[at], mask=channel < ref.shape[2], other=0.0)


def _store(ref: Any, row: jax.Array, head: jax.Array, x: jax.Array) -> None:
    """Writes channels x [d padded] of a row and head of ref [rows, h_kv, d]."""
    channel = _channels(ref.shape[2])
    at = (jnp.full_like(channel, row), jnp.full_like(channel, head), channel)
    plt.store(ref.at[at], x, mask=channel < ref.shape[2])


def _observe(x: Observed, old: Any, index: jax.Array, row: jax.Array, head: jax.Array, count: jax.Array) -> jax.Array:
    """Sums [d padded] of the squares of queries, the chunk's included, averaged over the query heads of the KV head."""
    power = _load(old.query_power, row, head)  # [d padded]
    if x.query is None:
        return power
    tokens, heads, dim = x.query.shape[1:]
    group = heads // x.keys.shape[2]
    for token in range(tokens):
        squares = jnp.zeros_like(power)
        for member in range(group):
            channel = _channels(dim)  # [d padded]
            at = [jnp.full_like(channel, i) for i in (index, token, head * group + member)]
            mask = (channel < dim) & (token < count)
            query = plt.load(x.query.at[(*at, channel)], mask=mask, other=0).astype(jnp.float32)  # [d padded]
            squares += query * query
        power += squares * (1.0 / group)
    return power


def _fix(
    x: Observed,
    old: Any,
    out: Any,
    where: tuple[jax.Array, ...],
    span: tuple[jax.Array, jax.Array],
    power: jax.Array,
    queries: jax.Array,
    plan: StatisticsPlan,
) -> None:
    """Fixes mean and weight of a head from the chunk and the ring, which still holds every token but the sink tokens.

    Args:
        x: References.
        old: Statistics before.
        out: Statistics to write.
        where: Chunk, cache row and KV head.
        span: Tokens of the row before and after the chunk.
        power: [d padded], sums of squares of queries.
        queries: Number of these queries.
        plan: Static configuration.
    """
    _, row, head = where
    dim = x.keys.shape[3]
    exists = _channels(dim) < dim  # [d padded]; so are all arrays below
    total, square, count = _sum_keys(x, where, span, None, plan)
    tokens = jnp.maximum(count, 1.0)
    mean = total / tokens
    deviation = _sum_keys(x, where, span, mean, plan)[1]
    spread, size = (_root(y / tokens, plan) for y in (deviation, square))

    def head_mean(y: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(exists, y, 0.0)) / dim

    def floored(y: jax.Array, least: jax.Array) -> jax.Array:
        average = head_mean(y)
        return jnp.where(average > least, jnp.maximum(y, plan.floor * average), 1.0)

    rms = floored(_root(power / jnp.maximum(queries, 1.0), plan), jnp.zeros_like(count))
    rms = jnp.where(queries > 0, rms, 1.0)
    ratio = jnp.where(exists, rms / floored(spread, plan.equal * head_mean(size)), 1.0)
    weight = exp2(plan.balance * log2(ratio, interpret=plan.interpret), interpret=plan.interpret)
    enough = count >= plan.least_tokens
    for wanted, name, new in ((plan.center, "mean", mean), (plan.smooth, "weight", weight)):
        if wanted:
            _store(getattr(out, name), row, head, jnp.where(enough, new, _load(getattr(old, name), row, head)))


def _root(x: jax.Array, plan: StatisticsPlan) -> jax.Array:
    """Square roots, zero for zero."""
    positive = x > 0
    root = exp2(0.5 * log2(jnp.where(positive, x, 1.0), interpret=plan.interpret), interpret=plan.interpret)
    return jnp.where(positive, root, 0.0)


def _sum_keys(
    x: Observed,
    where: tuple[jax.Array, ...],
    span: tuple[jax.Array, jax.Array],
    mean: jax.Array | None,
    plan: StatisticsPlan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum and sum of squares [d padded] of keys, less `mean` [d padded] if it is given, and the number of keys."""
    (index, row, head), (before, after) = where, span
    dim = x.keys.shape[3]
    channel = lax.broadcasted_iota(jnp.int32, (TILE, power_of_two(dim)), 1)  # [TILE, d padded]

    def add(state: tuple, ref: Any, valid: jax.Array, at: tuple[jax.Array, ...]) -> tuple:
        total, square, count = state  # [d padded], [d padded], []
        mask = jnp.broadcast_to(valid[:, None], channel.shape) & (channel < dim)  # [TILE, d padded]
        place = tuple(jnp.broadcast_to(i[:, None] if i.ndim else i, channel.shape) for i in at)
        key = plt.load(ref.at[(*place, channel)], mask=mask, other=jnp.zeros((), ref.dtype))  # [TILE, d padded]
        key = lax.bitcast_convert_type(key, jnp.bfloat16) if key.dtype == jnp.uint16 else key
        key = key.astype(jnp.float32)
        key = jnp.where(mask, key if mean is None else key - mean[None], 0.0)
        number = jnp.sum(valid.astype(jnp.float32))
        return total + jnp.sum(key, axis=0), square + jnp.sum(key * key, axis=0), count + number

    def ring(step: jax.Array, state: tuple) -> tuple:
        slot = plan.sink_slots + step * TILE + lax.broadcasted_iota(jnp.int32, (TILE,), 0)  # [TILE]
        return add(state, x.window, slot < jnp.minimum(before, x.slots), (row, head, slot))

    zero = jnp.zeros((channel.shape[1],), jnp.float32)
    state = (zero, zero, jnp.zeros((), jnp.float32))
    if x.slots > plan.sink_slots:
        state = lax.fori_loop(0, pl.cdiv(x.slots - plan.sink_slots, TILE), ring, state)
    token = lax.broadcasted_iota(jnp.int32, (TILE,), 0)  # [TILE]
    new = (before + token >= plan.sink_slots) & (before + token < after)  # [TILE]
    return add(state, x.keys, new, (index, token, head))
