"""The merge kernel: combines the splits of decode and of full-precision slots, and leaves the rotated basis.

A split is acc = sum of 2**(w - peak) * value, total = sum of 2**(w - peak) and peak, with w = logit * log2(e). One
program combines the packed splits of one query, rotates their sum back, adds the full-precision splits, which never
were rotated, and divides. docs/decode_step.md draws the launches before.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.numerics import FLOOR, HIDDEN, LOG2_E, power_of_two
from pallas_kernels.pytree import pytree
from pallas_kernels.tiles.intrinsics_triton import exp2
from pallas_kernels.tiles.rotation_triton import BLOCK, Basis, Segment, apply_factors, channels_of, grid_of, load_signs

LOADED, LOADED_MASKED = 2048, 1024
"""Elements of acc that a warp has in flight: fewer above 128 channels and for dims with masks, which take registers."""


ELEMENTS_PER_WARP = 1024
"""Elements of acc per warp, 32 per thread: ptxas keeps few loads in flight and waits for them in turns."""


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """Static configuration of the kernel.

    Attributes:
        shape: Shape of the queries, [b, t, h_q, d].
        dtype: Type of the output.
        partial: Whether to write also the log-sum-exp of each query and whether it saw a key.
        num_warps: Warps per program.
        interpret: Whether the kernel runs as jnp.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    partial: bool
    num_warps: int
    interpret: bool


@pytree
class Splits:
    """Partial attention over disjoint sets of keys, exponents base 2; arrays or references.

    Attributes:
        acc: float32 [b, h_kv, splits, t * g, d], sum of 2**(w - peak) * value of each query row.
        peak: float32 [b, h_kv, splits, t * g or more], exponent that acc and total are relative to.
        total: float32 [b, h_kv, splits, t * g or more], sum of 2**(w - peak).
    """

    acc: Any
    peak: Any
    total: Any


@pytree
class MergeInputs:
    """Arrays of the kernel, or references; None where a field does not apply.

    Attributes:
        packed: Splits over packed pages, in the rotated basis.
        exact: Splits over full-precision slots, in the original basis.
        basis: Rotated basis of the values; None for values that are not rotated.
        sink_logits: [h_q], learned logits without a value.
        rows: int32 [b], cache row of each sequence; None for all in order.
        counts: int32 [b], query tokens of each sequence, the rest being padding; None for t.
        overflow: bool [rows], cache rows whose outputs are NaN.
    """

    packed: Splits | None
    exact: Splits | None = None
    basis: Basis | None = None
    sink_logits: Any = None
    rows: Any = None
    counts: Any = None
    overflow: Any = None


def merge_plan(shape: tuple[int, ...], *, splits: int, dtype: str, partial: bool, interpret: bool) -> MergePlan:
    """The plan for outputs [b, t, h_q, d] of a number of packed splits."""
    elements = power_of_two(splits) * power_of_two(shape[3])
    num_warps = max(2, min(8, elements // ELEMENTS_PER_WARP))
    batch, count, heads, dim = shape
    return MergePlan((batch, count, heads, dim), dtype, partial, num_warps, interpret)


def merge_splits(x: MergeInputs, plan: MergePlan) -> tuple[jax.Array, ...]:
    """Launches the kernel.

    Returns:
        The output [b, t, h_q, d]. If partial, also the natural log-sum-exp float32 [b, t, h_q], HIDDEN where no key is
        seen, and float32 [b, t, h_q] that is 1.0 where a key is seen and 0.0 elsewhere.
    """
    batch, count, heads, _ = plan.shape
    shapes = [jax.ShapeDtypeStruct(plan.shape, plan.dtype)]
    if plan.partial:
        shapes += [jax.ShapeDtypeStruct(plan.shape[:3], jnp.float32)] * 2
    return tuple(
        pl.pallas_call(
            functools.partial(_body, plan=plan),
            grid=(heads, count, batch),
            out_shape=shapes,
            compiler_params=plt.CompilerParams(num_warps=plan.num_warps, num_stages=2),
            interpret=plan.interpret,
            name="merge",
        )(x)
    )


@dataclasses.dataclass(frozen=True)
class _Query:
    """The query of a program; all are numbers.

    Attributes:
        sequence: Sequence of the batch.
        token: Query token.
        head: Query head.
        kv_head: KV head.
        column: Its query row among those of the KV head, token * group + head.
        top: Exponent that sums are relative to, the largest peak.
    """

    sequence: jax.Array
    token: jax.Array
    head: jax.Array
    kv_head: jax.Array
    column: jax.Array
    top: jax.Array


def _body(x: MergeInputs, out_ref: Any, *partial_refs: Any, plan: MergePlan) -> None:
    """The kernel body; program (query head, token, sequence) writes one query.

    Args:
        x: References, see `MergeInputs`.
        out_ref: [b, t, h_q, d], output.
        *partial_refs: float32 [b, t, h_q] each, log-sum-exp and whether a key is seen; none unless partial.
        plan: Static configuration.
    """
    query = _query_of_program(x, plan)
    # Loaded before the peaks are reduced: no load moves up past a barrier.
    ahead = _loaded_ahead(x, query, plan)
    query, sums = _summed(x, query, plan)
    seen = sums > 0
    inverse = 1.0 / jnp.where(seen, sums, 1.0)
    padding, overflow = None, None
    if x.counts is not None:
        padding = query.token >= x.counts[query.sequence]
    if x.overflow is not None:
        overflow = x.overflow[query.sequence if x.rows is None else x.rows[query.sequence]]

    def write(channel: jax.Array, valid: jax.Array, values: jax.Array) -> None:
        """Finishes and writes packed sums, values of existing channels in the original basis; all [n, k]."""
        if x.exact is not None:
            values = values + _combined(x.exact, query, channel, valid, plan, ahead.exact)
        values = values * inverse
        if padding is not None:
            values = jnp.where(padding, 0.0, values)
        if overflow is not None:
            values = jnp.where(overflow, jnp.nan, values)
        at = [jnp.broadcast_to(i, channel.shape) for i in (query.sequence, query.token, query.head)]
        plt.store(out_ref.at[(*at, channel)], values.astype(plan.dtype), mask=valid)

    if x.packed is None or x.basis is None:
        i, valid = _channels(plan)
        packed = None if x.packed is None else _combined(x.packed, query, i, valid, plan, ahead.packed[0])
        write(i, valid, jnp.zeros(i.shape, jnp.float32) if packed is None else packed)
    else:
        _rotate_back(x.packed, x.basis, query, write, plan, ahead.packed)
    if plan.partial:
        log_sum = (query.top + jnp.log2(jnp.where(seen, sums, 1.0))) * math.log(2)
        peak_ref, seen_ref = partial_refs
        peak_ref[query.sequence, query.token, query.head] = jnp.where(seen, log_sum, HIDDEN)
        seen_ref[query.sequence, query.token, query.head] = jnp.where(seen, 1.0, 0.0)


def _query_of_program(x: MergeInputs, plan: MergePlan) -> _Query:
    """The query of this program, without its reference."""
    head, token, sequence = (pl.program_id(axis) for axis in range(3))
    splits = x.exact if x.packed is None else x.packed
    assert splits is not None
    group = plan.shape[2] // splits.peak.shape[1]
    kv_head, inner = lax.div(head, jnp.int32(group)), lax.rem(head, jnp.int32(group))
    return _Query(sequence, token, head, kv_head, token * group + inner, jnp.float32(FLOOR))


def _summed(x: MergeInputs, query: _Query, plan: MergePlan) -> tuple[_Query, jax.Array]:
    """The query with its reference, and its sum of exponentials, relative to that."""
    splits = [s for s in (x.packed, x.exact) if s is not None]
    peaks = [_of_splits(s.peak, query, _split_index(s), HIDDEN) for s in splits]  # [splits] each
    totals = [_of_splits(s.total, query, _split_index(s), 0.0) for s in splits]  # [splits] each
    top = query.top
    for peak in peaks:
        top = jnp.maximum(top, jnp.max(peak))
    sums = jnp.float32(0)
    if x.sink_logits is not None:
        sink = x.sink_logits[query.head].astype(jnp.float32) * LOG2_E
        top = jnp.maximum(top, sink)
        sums = jnp.exp2(sink - top)
    for peak, total in zip(peaks, totals, strict=True):
        sums = sums + jnp.sum(total * exp2(peak - top, interpret=plan.interpret))
    return dataclasses.replace(query, top=top), sums


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """Sums of splits [splits padded, n, k] that are loaded before their weights are known; None for others.

    Attributes:
        packed: Of each segment of the basis, or of all channels.
        exact: At the places at which they are written.
    """

    packed: list[jax.Array | None]
    exact: jax.Array | None


def _loaded_ahead(x: MergeInputs, query: _Query, plan: MergePlan) -> _Ahead:
    whole = _channels(plan)
    if x.packed is None or x.basis is None:
        grids, blocks = [whole], 1
    else:
        grids, blocks, start = [], 0, 0
        for segment in x.basis.segments:
            i, j, valid = grid_of(segment)  # [n, k] each
            grids.append((start + i * segment.inner_size + j, valid))
            blocks, start = blocks + -(-i.shape[0] // BLOCK), start + segment.dim
    packed = [None if x.packed is None else _load_all(x.packed, query, *grid, plan) for grid in grids]
    # Where a rotation comes in several blocks, channels are written in other tiles than these.
    exact = None if x.exact is None or blocks > 1 else _load_all(x.exact, query, *grids[0], plan)
    return _Ahead(packed, exact)


def _channels(plan: MergePlan) -> tuple[jax.Array, jax.Array]:
    """All channels, and whether they exist, [d padded, 1] each."""
    i = lax.broadcasted_iota(jnp.int32, (power_of_two(plan.shape[3]), 1), 0)
    return i, i < plan.shape[3]


def _rotate_back(
    splits: Splits,
    basis: Basis,
    query: _Query,
    write: Callable[..., None],
    plan: MergePlan,
    ahead: list[jax.Array | None],
) -> None:
    """Combines splits segment by segment and passes their sums to `write`, in the original basis."""
    start = 0
    for index, segment in enumerate(basis.segments):
        i, j, valid = grid_of(segment)  # [n, k] each
        place = start + i * segment.inner_size + j  # [n, k]
        sums = _combined(splits, query, place, valid, plan, ahead[index])  # [n, k]

        def consume(
            place: jax.Array,
            valid: jax.Array,
            values: jax.Array,
            state: jax.Array,
            segment: Segment = segment,
            index: int = index,
        ) -> jax.Array:
            signs = load_signs(segment, place, valid)  # [m, k]
            values = jnp.sum(values, axis=0)  # [1, m, k] -> [m, k]
            write(channels_of(basis, index, place, valid), valid, values if signs is None else values * signs)
            return state

        apply_factors(segment, sums[:, None], consume, jnp.int32(0), inverse=True)
        start += segment.dim


def _split_index(splits: Splits) -> jax.Array:
    """Numbers of splits, [splits padded]."""
    return lax.broadcasted_iota(jnp.int32, (power_of_two(splits.peak.shape[2]),), 0)


def _of_splits(ref: Any, query: _Query, split: jax.Array, other: float) -> jax.Array:
    """The query's number of each split [n], from ref [b, h_kv, splits, query rows]; `other` where there is no split."""
    at = [jnp.broadcast_to(i, split.shape) for i in (query.sequence, query.kv_head, split, query.column)]
    return plt.load(ref.at[tuple(at)], mask=split < ref.shape[2], other=other)


def _splits_per_step(splits: Splits, place: jax.Array, plan: MergePlan) -> int:
    """Splits whose sums at places [n, k] are loaded at once."""
    dim = plan.shape[3]
    loaded = LOADED if dim == power_of_two(dim) and dim <= 128 else LOADED_MASKED
    return max(1, min(power_of_two(splits.acc.shape[2]), loaded * plan.num_warps // place.size))


def _load_acc(
    splits: Splits, query: _Query, place: jax.Array, valid: jax.Array, index: jax.Array | int, step: int
) -> jax.Array:
    """Step `index` of acc at places [n, k] of the last axis, where valid: [step, n, k]."""
    split = index * step + lax.broadcasted_iota(jnp.int32, (step,), 0)  # [step]
    shape = (step, *place.shape)
    at = (query.sequence, query.kv_head, split[:, None, None], query.column, place[None])
    mask = jnp.broadcast_to((split < splits.acc.shape[2])[:, None, None] & valid[None], shape)
    return plt.load(splits.acc.at[tuple(jnp.broadcast_to(i, shape) for i in at)], mask=mask, other=0.0)


def _load_all(splits: Splits, query: _Query, place: jax.Array, valid: jax.Array, plan: MergePlan) -> jax.Array | None:
    """All of acc at places [n, k] of the last axis, [splits padded, n, k]; None if that takes several steps."""
    step = _splits_per_step(splits, place, plan)
    return None if step < splits.acc.shape[2] else _load_acc(splits, query, place, valid, 0, step)


def _combined(
    splits: Splits, query: _Query, place: jax.Array, valid: jax.Array, plan: MergePlan, ahead: jax.Array | None
) -> jax.Array:
    """Sum over splits of 2**(peak - top) * acc at places [n, k] of the last axis, where valid: [n, k]."""
    step = _splits_per_step(splits, place, plan)

    def add(index: jax.Array | int, sums: jax.Array) -> jax.Array:
        split = index * step + lax.broadcasted_iota(jnp.int32, (step,), 0)  # [step]
        weight = exp2(_of_splits(splits.peak, query, split, HIDDEN) - query.top, interpret=plan.interpret)  # [step]
        acc = _load_acc(splits, query, place, valid, index, step) if ahead is None else ahead  # [step, n, k]
        return sums + jnp.sum(acc * weight[:, None, None], axis=0)

    zero = jnp.zeros(place.shape, jnp.float32)
    steps = -(-splits.acc.shape[2] // step)
    return add(0, zero) if steps == 1 else lax.fori_loop(0, steps, add, zero)
