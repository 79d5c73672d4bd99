"""The merge kernel: combines the splits of decode and of full-precision slots, and leaves the rotated basis.

Splits come as acc = sum of 2**(w - peak) * value, total = sum of 2**(w - peak) and peak, with w base 2. A program
combines all coordinates of some queries, turns them to a block of channels, adds full-precision splits and divides.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode.basis import Basis, basis_tile, float32_product, power_of_two
from pallas_kernels.decode.exact_triton import FLOOR, HIDDEN, LOG2_E
from pallas_kernels.decode.partial import NO_KEY
from pallas_kernels.lookup_triton import exp2

LOADED = 4096
"""Elements of acc a step."""


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """What is static about the kernel.

    Attributes:
        shape: Of the queries, [b, t, h_q, d].
        dtype: Of the output.
        partial: Whether to write log-sums and whether a key was seen, too.
        rows: Queries a program.
        channels: Channels a program.
        interpret: Whether the kernel runs as jnp.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    partial: bool
    rows: int
    channels: int
    interpret: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Splits:
    """Attention over disjoint sets of keys, base 2; arrays or references.

    Attributes:
        acc: float32 [b, h_kv, splits, t * g, d].
        peak: float32 [b, h_kv, splits, t * g or more].
        total: Likewise.
    """

    acc: Any
    peak: Any
    total: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergeInputs:
    """Arrays of the kernel, or references; None for what there is not.

    Attributes:
        packed: Splits over packed pages, in the basis.
        exact: Splits over full-precision slots, in the original basis.
        basis: Of the values; None to leave them as they are.
        sink_logits: [h_q], learned logits without a value.
        rows: int32 [b], cache row of each sequence; None for all in order.
        counts: int32 [b], queries of each sequence, the others being padding; None for t.
        overflow: bool [rows], rows whose outputs are NaN.
    """

    packed: Splits | None
    exact: Splits | None = None
    basis: Basis | None = None
    sink_logits: Any = None
    rows: Any = None
    counts: Any = None
    overflow: Any = None


def merge_plan(shape: tuple[int, ...], *, segments: int, dtype: str, partial: bool, interpret: bool) -> MergePlan:
    """The plan for outputs [b, t, h_q, d] in a basis of some segments: a program a multiprocessor of an H100."""
    batch, count, heads, dim = shape
    queries = batch * count * heads
    # What the factors of a program take of registers.
    channels = min(power_of_two(dim), max(16, 64 * 128 // (power_of_two(dim) * max(1, segments))))
    rows = min(16, power_of_two(max(1, queries * -(-dim // channels) // 128)))
    return MergePlan((batch, count, heads, dim), dtype, partial, rows, channels, interpret)


def merge_splits(x: MergeInputs, plan: MergePlan) -> tuple[jax.Array, ...]:
    """Launches the kernel.

    Returns:
        The output [b, t, h_q, d] and, if partial, the natural logarithm of the sum of exponentials (NO_KEY if there is
        none) and 1.0 or 0.0, whether a key was seen [b, t, h_q].
    """
    batch, count, heads, dim = plan.shape
    shapes = [jax.ShapeDtypeStruct(plan.shape, plan.dtype)]
    if plan.partial:
        shapes += [jax.ShapeDtypeStruct(plan.shape[:3], jnp.float32)] * 2
    return tuple(
        pl.pallas_call(
            functools.partial(_body, plan=plan),
            grid=(-(-dim // plan.channels), -(-batch * count * heads // plan.rows)),
            out_shape=shapes,
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
            interpret=plan.interpret,
            name="merge",
        )(x)
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Queries [rows] of a program: whether they exist and where they are."""

    exists: jax.Array
    sequence: jax.Array
    token: jax.Array
    head: jax.Array
    kv_head: jax.Array
    column: jax.Array


def _body(x: MergeInputs, out_ref: Any, *partial_refs: Any, plan: MergePlan) -> None:
    dim = plan.shape[3]
    rows = _rows(x, plan)
    channel = pl.program_id(0) * plan.channels + lax.broadcasted_iota(jnp.int32, (plan.channels,), 0)
    splits = [s for s in (x.packed, x.exact) if s is not None]
    peaks = [_all_splits(s.peak, rows, HIDDEN) for s in splits]
    top = jnp.full((plan.rows,), FLOOR, jnp.float32)
    for peak in peaks:
        top = jnp.maximum(top, jnp.max(peak, axis=1))
    sink = None
    if x.sink_logits is not None:
        sink = plt.load(x.sink_logits.at[rows.head], mask=rows.exists, other=jnp.zeros((), x.sink_logits.dtype))
        sink = sink.astype(jnp.float32) * LOG2_E
        top = jnp.maximum(top, sink)
    sums = jnp.zeros((plan.rows,), jnp.float32)
    for s, peak in zip(splits, peaks, strict=True):
        weight = exp2(peak - top[:, None], interpret=plan.interpret)
        sums = sums + jnp.sum(_all_splits(s.total, rows, 0.0) * weight, axis=1)
    if sink is not None:
        sums = sums + exp2(sink - top, interpret=plan.interpret)

    out = jnp.zeros((plan.rows, plan.channels), jnp.float32)
    if x.packed is not None:
        out = _packed(x.packed, x.basis, rows, top, channel, plan)
    if x.exact is not None:
        out = out + _combined(x.exact, rows, top, channel, plan)
    seen = sums > 0
    out = out / jnp.where(seen, sums, 1.0)[:, None]
    out = _masked(x, out, rows, plan)
    shape = (plan.rows, plan.channels)
    at = [jnp.broadcast_to(i[:, None], shape) for i in (rows.sequence, rows.token, rows.head)]
    at.append(jnp.broadcast_to(channel[None, :], shape))
    mask = rows.exists[:, None] & (channel < dim)[None, :]
    plt.store(out_ref.at[tuple(at)], out.astype(plan.dtype), mask=mask)
    if plan.partial:
        log_sum = (top + jnp.log2(jnp.where(seen, sums, 1.0))) * math.log(2)
        once = rows.exists & (pl.program_id(0) == 0)
        for ref, value in zip(partial_refs, (jnp.where(seen, log_sum, NO_KEY), jnp.where(seen, 1.0, 0.0)), strict=True):
            plt.store(ref.at[rows.sequence, rows.token, rows.head], value, mask=once)


def _rows(x: MergeInputs, plan: MergePlan) -> _Rows:
    batch, count, heads, _ = plan.shape
    splits = x.packed or x.exact
    assert splits is not None
    group = heads // splits.peak.shape[1]
    row = pl.program_id(1) * plan.rows + lax.broadcasted_iota(jnp.int32, (plan.rows,), 0)

    def divided(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
        divisor = jnp.full_like(x, by)
        return lax.div(x, divisor), lax.rem(x, divisor)

    rest, head = divided(row, heads)
    sequence, token = divided(rest, count)
    kv_head, inner = divided(head, group)
    return _Rows(row < batch * count * heads, sequence, token, head, kv_head, token * group + inner)


def _all_splits(ref: Any, rows: _Rows, other: float) -> jax.Array:
    """Numbers [rows, splits] of each split, padded with `other`."""
    split = lax.broadcasted_iota(jnp.int32, (1, power_of_two(ref.shape[2])), 1)
    return _of_splits(ref, rows, split, other)


def _of_splits(ref: Any, rows: _Rows, split: jax.Array, other: float) -> jax.Array:
    shape = (rows.head.shape[0], split.shape[1])
    at = [jnp.broadcast_to(i, shape) for i in (rows.sequence[:, None], rows.kv_head[:, None], split)]
    at.append(jnp.broadcast_to(rows.column[:, None], shape))
    mask = rows.exists[:, None] & (split < ref.shape[2])
    return plt.load(ref.at[tuple(at)], mask=mask, other=other)


def _packed(
    splits: Splits, basis: Basis | None, rows: _Rows, top: jax.Array, channel: jax.Array, plan: MergePlan
) -> jax.Array:
    """Sum over packed splits [rows, channels], turned to the original basis."""
    if basis is None:
        return _combined(splits, rows, top, channel, plan)
    coordinate = lax.broadcasted_iota(jnp.int32, (power_of_two(plan.shape[3]),), 0)
    factors = basis_tile(basis, channel, coordinate, channel_axis=1)
    sums = _combined(splits, rows, top, coordinate, plan)
    return float32_product(sums, factors, interpret=plan.interpret)


def _combined(splits: Splits, rows: _Rows, top: jax.Array, channel: jax.Array, plan: MergePlan) -> jax.Array:
    """Sum over splits of 2**(peak - top) * acc [rows, channels]."""
    number, dim = splits.acc.shape[2], splits.acc.shape[4]
    width = channel.shape[0]
    step = max(1, min(power_of_two(number), LOADED // (plan.rows * width)))
    shape = (plan.rows, step, width)

    def add(index: jax.Array, sums: jax.Array) -> jax.Array:
        split = index * step + lax.broadcasted_iota(jnp.int32, (1, step), 1)
        weight = exp2(_of_splits(splits.peak, rows, split, HIDDEN) - top[:, None], interpret=plan.interpret)
        at = [jnp.broadcast_to(i[:, None, None], shape) for i in (rows.sequence, rows.kv_head)]
        at.append(jnp.broadcast_to(split[:, :, None], shape))
        at.append(jnp.broadcast_to(rows.column[:, None, None], shape))
        at.append(jnp.broadcast_to(channel[None, None, :], shape))
        mask = rows.exists[:, None, None] & (split < number)[:, :, None] & (channel < dim)[None, None, :]
        acc = plt.load(splits.acc.at[tuple(at)], mask=jnp.broadcast_to(mask, shape), other=0.0)
        return sums + jnp.sum(acc * weight[:, :, None], axis=1)

    zero = jnp.zeros((plan.rows, width), jnp.float32)
    return lax.fori_loop(0, -(-number // step), add, zero)


def _masked(x: MergeInputs, out: jax.Array, rows: _Rows, plan: MergePlan) -> jax.Array:
    """Zero for padding, NaN for rows that overflowed."""
    if x.counts is not None:
        count = plt.load(x.counts.at[rows.sequence], mask=rows.exists, other=0)
        out = jnp.where((rows.token < count)[:, None], out, 0.0)
    if x.overflow is not None:
        row = rows.sequence if x.rows is None else plt.load(x.rows.at[rows.sequence], mask=rows.exists, other=0)
        overflow = plt.load(x.overflow.at[row], mask=rows.exists, other=False)
        out = jnp.where(overflow[:, None], jnp.nan, out)
    return out
