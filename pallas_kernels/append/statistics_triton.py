"""The kernel that observes queries and fixes the key statistics of rows, in place, for chunks of a few tokens.

Where statistics are fixed, as they are for all but the first tokens of a row, a program reads that and ends.
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
from pallas_kernels.tiles.intrinsics_triton import exp2, log2

TILE = 16
"""Tokens of the window a step."""


@dataclasses.dataclass(frozen=True)
class StatisticsPlan:
    """What is static about the kernel.

    Attributes:
        sinks: Full-precision slots for the first tokens, which statistics leave out.
        max_tokens: Tokens that a row can hold.
        center: Whether means are fixed.
        smooth: Whether weights are.
        least_tokens: Keys without which nothing is fixed but that nothing is.
        balance: Power of the ratio of queries to keys.
        floor: Least spread of a channel, relative to the mean of its head.
        equal: Spread of a head, relative to its size, below which all channels weigh the same.
        interpret: Whether the kernel runs as jnp.
    """

    sinks: int
    max_tokens: int
    center: bool
    smooth: bool
    least_tokens: int
    balance: float
    floor: float
    equal: float
    interpret: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
    """What the kernel reads; arrays or references.

    Attributes:
        query: [b, t, h_q, d], or None.
        keys: [b, t, h_kv, d], new keys of the window's type.
        counts: int32 [b], how many of them exist.
        rows: int32 [b], the rows of the cache that they are for, all different.
        window: [rows, h_kv, slots, d], full-precision keys; as uint16 the bits of bfloat16; None without slots.
        length: int32 [rows], tokens before.
        compressed: int32 [rows], those in pages.
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
        """Full-precision slots of a row."""
        return 0 if self.window is None else self.window.shape[2]


def update_statistics(x: Observed, statistics: Any, plan: StatisticsPlan) -> Any:
    """The statistics of a cache with those of some rows up to date, before their chunks are appended.

    Args:
        x: The chunks and the window.
        statistics: A `tq_jax.statistics.KeyStatistics`.
        plan: What is static.
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
            power = _observe(x, old, index, row, number, after - before)
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
    return lax.broadcasted_iota(jnp.int32, (power_of_two(dim),), 0)


def _load(ref: Any, row: jax.Array, head: jax.Array) -> jax.Array:
    channel = _channels(ref.shape[2])
    at = (jnp.full_like(channel, row), jnp.full_like(channel, head), channel)
    return plt.load(ref.at[at], mask=channel < ref.shape[2], other=0.0)


def _store(ref: Any, row: jax.Array, head: jax.Array, x: jax.Array) -> None:
    channel = _channels(ref.shape[2])
    at = (jnp.full_like(channel, row), jnp.full_like(channel, head), channel)
    plt.store(ref.at[at], x, mask=channel < ref.shape[2])


def _observe(x: Observed, old: Any, index: jax.Array, row: jax.Array, head: jax.Array, count: jax.Array) -> jax.Array:
    """Sums of the squares of queries, those of a chunk included."""
    power = _load(old.query_power, row, head)
    if x.query is None:
        return power
    tokens, heads, dim = x.query.shape[1:]
    group = heads // x.keys.shape[2]
    for token in range(tokens):
        squares = jnp.zeros_like(power)
        for member in range(group):
            channel = _channels(dim)
            at = [jnp.full_like(channel, i) for i in (index, token, head * group + member)]
            mask = (channel < dim) & (token < count)
            query = plt.load(x.query.at[(*at, channel)], mask=mask, other=0).astype(jnp.float32)
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
    """Fixes mean and weight of a head from the ring, which still holds every token but the sinks, and the chunk."""
    _, row, head = where
    dim = x.keys.shape[3]
    exists = _channels(dim) < dim
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
    """Sum and sum of squares of keys, less their mean if it is known, and their number."""
    (index, row, head), (before, after) = where, span
    dim = x.keys.shape[3]
    channel = lax.broadcasted_iota(jnp.int32, (TILE, power_of_two(dim)), 1)

    def add(state: tuple, ref: Any, valid: jax.Array, at: tuple[jax.Array, ...]) -> tuple:
        total, square, count = state
        mask = jnp.broadcast_to(valid[:, None], channel.shape) & (channel < dim)
        place = tuple(jnp.broadcast_to(i[:, None] if i.ndim else i, channel.shape) for i in at)
        key = plt.load(ref.at[(*place, channel)], mask=mask, other=jnp.zeros((), ref.dtype))
        key = lax.bitcast_convert_type(key, jnp.bfloat16) if key.dtype == jnp.uint16 else key
        key = key.astype(jnp.float32)
        key = jnp.where(mask, key if mean is None else key - mean[None], 0.0)
        number = jnp.sum(valid.astype(jnp.float32))
        return total + jnp.sum(key, axis=0), square + jnp.sum(key * key, axis=0), count + number

    def ring(step: jax.Array, state: tuple) -> tuple:
        slot = plan.sinks + step * TILE + lax.broadcasted_iota(jnp.int32, (TILE,), 0)
        return add(state, x.window, slot < jnp.minimum(before, x.slots), (row, head, slot))

    zero = jnp.zeros((channel.shape[1],), jnp.float32)
    state = (zero, zero, jnp.zeros((), jnp.float32))
    if x.slots > plan.sinks:
        state = lax.fori_loop(0, pl.cdiv(x.slots - plan.sinks, TILE), ring, state)
    token = lax.broadcasted_iota(jnp.int32, (TILE,), 0)
    new = (before + token >= plan.sinks) & (before + token < after)
    return add(state, x.keys, new, (index, token, head))
