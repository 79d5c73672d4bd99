"""The decode kernel: one program attends over a run of tiles of one sequence and KV head; docs/decode_step.md draws it.

A few programs attend over tokens in full precision instead, see `attention.exact`. In all others, tokens are the rows
and query rows the columns of every product, so that query rows pad to 8 and not to 16:

    logits [tile, columns] = keys [tile, channels] @ q^T
    acc [channels, columns] += values [channels, tile] @ p

Both products take int8 half-integers m of centroids (m + 1/2) * step. q is an integer of two bytes with one scale per
query row; so is p, the probability times the value scale, with one scale per tile and query row. The halves leave the
tiles as sum(q) / 2 and sum(p) / 2. Value scales enter as logarithms: w = logit + log2(scale), p = 2**(w - max w), so
that the largest p of a tile is exactly the largest integer. Where half of the columns would be padding, the high and
the low byte of a query row are two columns (a pair), at no cost; elsewhere p takes two products, and q has one byte
unless the plan is precise. `decode.plan` defines the words.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.decode.plan import LARGEST_TWO_BYTES, DecodeInputs, DecodePlan
from pallas_kernels.attention.decode.queries_triton import (
    QuantizedQuery,
    byte_of_column,
    bytes_of,
    integers,
    logit_unit,
    quantized_query,
    query_index,
    weight_of_byte,
)
from pallas_kernels.attention.exact import attend_exact
from pallas_kernels.attention.merge_triton import Splits
from pallas_kernels.numerics import BYTE_BITS, FLOOR, HIDDEN, LOG2_E, SIGNED_ANCHOR, SIGNED_ANCHOR_BITS
from pallas_kernels.tiles.intrinsics_triton import at_least, exp2, log2, tanh
from pallas_kernels.tiles.layout import Part
from pallas_kernels.tiles.loads_triton import load_scale, load_shifts, load_tiles, page_of, slot_of
from pallas_kernels.tiles.pool_ref import pool_refs

LEAST_SCALE = 2.0**-100
"""Smaller value scales are taken for this one; its inverse times 127 is still a float."""


def attend(x: DecodeInputs, packed: Splits, exact: Splits | None, *, plan: DecodePlan) -> None:
    """The kernel body; program (n, sequence, KV head) writes its split. All arguments but the plan are references.

    Args:
        x: See `DecodeInputs`.
        packed: Attention over the pages, in the rotated basis: acc [b, h_kv, splits, t * g, d], peak and total [b,
            h_kv, splits, blocks * columns], of which query rows come first and the rest is padding.
        exact: Attention over tokens in full precision; None if no program attends over them.
        plan: Static configuration.
    """
    program, row, head = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    x = dataclasses.replace(x, pages=pool_refs(x.pages, plan.pools, interpret=plan.interpret))
    if exact is None:
        _attend_pages(x, packed, program, row, head, plan)
        return
    assert plan.exact is not None and x.exact is not None
    first, tokens, how = plan.exact.programs, x.exact, plan.exact
    # Programs for tokens in full precision are short: the first wave has them, the last one is not theirs.
    pl.when(program < first)(lambda: attend_exact(tokens, exact, program, row, head, how))
    pl.when(program >= first)(lambda: _attend_pages(x, packed, program - first, row, head, plan))


def _attend_pages(
    x: DecodeInputs, out: Splits, program: jax.Array, row: jax.Array, head: jax.Array, plan: DecodePlan
) -> None:
    """Attends over a run of tiles; program split * blocks + block of a sequence and KV head."""
    # Blocks of columns of the same tiles come side by side, so that the second one finds the tiles in the cache.
    split, block = lax.div(program, jnp.int32(plan.blocks)), lax.rem(program, jnp.int32(plan.blocks))
    column = block * plan.columns + lax.broadcasted_iota(jnp.int32, (plan.columns,), 0)  # [columns]
    token, head_column = query_index(column, head, plan)  # [columns] each
    begin, end = _tiles_of_split(x, row, split, plan)
    # Loaded before the queries are reduced: no load moves up past a barrier.
    first_page = page_of(x, row, begin, plan)
    queries = [quantized_query(x, part, row, token, head_column, plan) for part in plan.keys]
    bias = None
    if x.bias is not None:
        bias = plt.load(x.bias.at[jnp.full_like(token, row), token, head_column]) * logit_unit(plan)  # [columns]
    position = None
    if plan.count > 1:
        position = plt.load(x.positions.at[jnp.full_like(token, row), token])  # [columns]
    shifts = load_shifts(x, plan)

    def step(index: jax.Array, state: tuple) -> tuple:
        page, parts, total = state  # page [] or [tile], total [folded_rows, columns]
        # Read a step early: the loads of the next tile wait for its page.
        following = page_of(x, row, index + 1, plan)
        where = (page, head, slot_of(index, plan))
        tokens = index * plan.tile + lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)  # [tile]
        seen = _seen_tokens(x, row, tokens, plan)  # [tile]
        visible = None if position is None else _visible(tokens, position, plan)  # [tile, columns]
        # Per value part: log2(scale) [tile] and 1 / scale [tile].
        exponents, inverses = zip(*(_exponent(x, part, where, seen, plan) for part in plan.values), strict=True)
        # The exponents of a single part are where the logits start to add up: a fused multiply-add less.
        alone = len(exponents) == 1 and plan.options.softcap is None
        logits = _logits(x, where, seen, queries, bias, exponents[0] if alone else None, shifts, plan)
        updated = []
        for i, part in enumerate(plan.values):
            w = logits if alone else logits + exponents[i][:, None]  # [tile, columns]
            if visible is not None:
                w = jnp.where(visible, w, HIDDEN)
            # p [tile, columns]; alpha, beta [columns]
            new, p, alpha, beta = _accumulate(x, part, where, w, inverses[i], seen, parts[i], shifts, plan)
            updated.append(new)
            if i == 0:
                total = total * alpha[None, :] + _fold(p * inverses[i][:, None], plan) * beta[None, :]
        return following, tuple(updated), total

    parts = tuple(_empty_part(part, plan) for part in plan.values)
    state = first_page, parts, _folded_zeros(plan)
    _, parts, total = lax.fori_loop(begin, end, step, state)
    _store_acc(parts, out.acc, (row, head, split), block * plan.columns, plan)
    numbers = _per_row((parts[0][1], jnp.sum(total, axis=0)), plan)
    columns = pl.ds(block * plan.columns, numbers[0].shape[0])
    for ref, number in zip((out.peak, out.total), numbers, strict=True):
        ref[row, head, split, columns] = number


def _pair_sums(x: jax.Array, plan: DecodePlan) -> jax.Array:
    """Sums of both columns of each pair of x [n, columns], in both columns; a thread holds both."""
    pairs = x.reshape(-1, plan.columns // 2, 2)  # [n, columns / 2, 2]
    return jnp.broadcast_to(jnp.sum(pairs, axis=2, keepdims=True), pairs.shape).reshape(x.shape)


def _per_row(numbers: tuple[jax.Array, ...], plan: DecodePlan) -> tuple[jax.Array, ...]:
    """Numbers [columns], of which both columns of a pair have the same, as one per pair: [columns / 2]."""
    return tuple(jnp.max(x.reshape(-1, 2), axis=1) for x in numbers) if plan.pairs else numbers


def _tiles_of_split(x: DecodeInputs, row: jax.Array, split: jax.Array, plan: DecodePlan) -> tuple[jax.Array, jax.Array]:
    """First tile of this program's run, and the tile behind its last: an equal share of the tiles that a query sees."""
    first = last = x.positions[row, 0]
    for i in range(1, plan.count):
        position = x.positions[row, i]
        first, last = jnp.minimum(first, position), jnp.maximum(last, position)
    stop = lax.div(jnp.maximum(jnp.minimum(x.lengths[row], last + 1), 0) + (plan.tile - 1), jnp.int32(plan.tile))
    start = jnp.int32(0)
    if plan.options.sliding_window is not None:
        start = lax.div(jnp.maximum(first - (plan.options.sliding_window - 1), 0), jnp.int32(plan.tile))
    share = lax.div(jnp.maximum(stop - start, 0) + (plan.splits - 1), jnp.int32(plan.splits))
    begin = start + split * share
    return begin, jnp.minimum(begin + share, stop)


def _seen_tokens(x: DecodeInputs, row: jax.Array, tokens: jax.Array, plan: DecodePlan) -> jax.Array:
    """Whether each of the tokens [tile] exists and, if there is one query token, whether it is visible to it."""
    stop = x.lengths[row]
    if plan.count > 1:
        return tokens < stop
    position = x.positions[row, 0]
    seen = tokens < jnp.minimum(stop, position + 1)  # [tile]
    if plan.options.sliding_window is not None:
        seen = seen & (tokens > position - plan.options.sliding_window)
    return seen


def _visible(tokens: jax.Array, position: jax.Array, plan: DecodePlan) -> jax.Array:
    """Which of the tokens [tile] the query at each position [columns] sees, by position alone: [tile, columns]."""
    visible = tokens[:, None] <= position[None, :]
    if plan.options.sliding_window is not None:
        visible = visible & (tokens[:, None] > position[None, :] - plan.options.sliding_window)
    return visible


def _logits(
    x: DecodeInputs,
    where: tuple,
    seen: jax.Array,
    queries: list[QuantizedQuery],
    bias: jax.Array | None,
    start: jax.Array | None,
    shifts: dict,
    plan: DecodePlan,
) -> jax.Array:
    """Logits [tile, columns] times log2(e), biased, soft-capped, plus start [tile]; finite where not seen [tile]."""
    keys = x.pages.keys
    shape = (plan.tile, plan.columns)
    logits = None if start is None else jnp.broadcast_to(start[:, None], shape)  # [tile, columns]
    if bias is not None:
        logits = bias[None, :] + jnp.zeros(shape, jnp.float32) if logits is None else logits + bias[None, :]
    for part, query in zip(plan.keys, queries, strict=True):
        scales = keys.residual if part.sketch else keys.scale
        scale = jnp.where(seen, load_scale(scales, part, where, plan), 0.0)  # [tile]
        source = keys.signs if part.sketch else keys.packed
        tiles = load_tiles(source, part, where, 1, shifts, plan)  # [tile, width] each
        if plan.precise and not plan.pairs:
            again = load_tiles(source, part, where, 1, shifts, plan, again=True)
            product = [
                _products(t, [q[i] for q in query.tiles], jnp.zeros(shape, jnp.int32))
                for i, t in enumerate((tiles, again))
            ]  # [tile, columns], of high and of low bytes
            whole = (product[0] << BYTE_BITS) + product[1] + query.half[None, :]  # [tile, columns]
            term = whole.astype(jnp.float32) * scale[:, None]
        else:
            # Sums start at the bits of a large float, which makes them floats without a conversion.
            large = jnp.broadcast_to((query.half + SIGNED_ANCHOR_BITS)[None, :], shape)  # [tile, columns]
            raw = lax.bitcast_convert_type(_products(tiles, [q[0] for q in query.tiles], large), jnp.float32)
            term = (raw - SIGNED_ANCHOR) * scale[:, None]
        term = term * query.factor[None, :]  # [tile, columns]
        if plan.pairs:
            term = _pair_sums(term, plan)
        logits = term if logits is None else term + logits
    assert logits is not None
    cap = plan.options.softcap
    return logits if cap is None else cap * LOG2_E * tanh(logits, interpret=plan.interpret)


def _products(tiles: list[jax.Array], queries: list[jax.Array], start: jax.Array) -> jax.Array:
    """Returns start [tile, columns] plus the products of key tiles [tile, width] with queries [width, columns]."""
    for tile, query in zip(tiles, queries, strict=True):
        start = start + lax.dot_general(tile, query, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return start


def _exponent(
    x: DecodeInputs, part: Part, where: tuple, seen: jax.Array, plan: DecodePlan
) -> tuple[jax.Array, jax.Array]:
    """log2 of the scales [tile] of a value part, HIDDEN where not seen, and the inverse scales, undefined there."""
    scale = load_scale(x.pages.values.scale, part, where, plan)  # [tile]
    if plan.interpret:
        # Compiled, the maximum of NaN and a number is the number.
        scale = jnp.where(seen, scale, 1.0)
    exponent = log2(at_least(scale, LEAST_SCALE, interpret=plan.interpret), interpret=plan.interpret)  # [tile]
    return jnp.where(seen, exponent, HIDDEN), exp2(-exponent, interpret=plan.interpret)


def _folded_zeros(plan: DecodePlan) -> jax.Array:
    return jnp.zeros((plan.folded_rows, plan.columns), jnp.float32)


def _fold(x: jax.Array, plan: DecodePlan) -> jax.Array:
    """Sums of x [tile, columns] over the rows of each thread, [folded_rows, columns]; the end sums these."""
    return jnp.sum(x.reshape(-1, plan.folded_rows, plan.columns), axis=0)


def _empty_part(part: Part, plan: DecodePlan) -> tuple:
    """Sums of a value part: acc [width, columns] per tile, reference [columns], offset [folded_rows, columns]."""
    acc = tuple(jnp.zeros((tile.width, plan.columns), jnp.float32) for tile in part.tiles)
    return acc, jnp.full((plan.columns,), FLOOR, jnp.float32), _folded_zeros(plan)


def _accumulate(
    x: DecodeInputs,
    part: Part,
    where: tuple,
    w: jax.Array,
    inverse: jax.Array,
    seen: jax.Array,
    state: tuple,
    shifts: dict,
    plan: DecodePlan,
) -> tuple[tuple, jax.Array, jax.Array, jax.Array]:
    """Adds a tile to a value part.

    Args:
        x: References.
        part: The part.
        where: Page, KV head and first slot of the tile.
        w: [tile, columns], logits plus log2 of the value scales.
        inverse: [tile], inverse value scales.
        seen: [tile], tokens that exist.
        state: Sums so far, see `_empty_part`; offset is the sum of p, or of p * zero for min-max values.
        shifts: See `load_shifts`.
        plan: Static configuration.

    Returns:
        The sums; p [tile, columns]; the factors [columns] of earlier sums and of this tile's.
    """
    acc, reference, offset = state
    tile_reference = jnp.maximum(jnp.max(w, axis=0) - math.log2(LARGEST_TWO_BYTES), FLOOR)  # [columns]
    p = exp2(w - tile_reference[None, :], interpret=plan.interpret)  # [tile, columns]
    new_reference = jnp.maximum(reference, tile_reference)  # [columns]
    alpha = exp2(reference - new_reference, interpret=plan.interpret)  # [columns]
    beta = exp2(tile_reference - new_reference, interpret=plan.interpret)  # [columns]
    tiles = load_tiles(x.pages.values.packed, part, where, 0, shifts, plan)  # [width, tile] each
    if plan.pairs:
        byte = byte_of_column(integers(p), plan).astype(jnp.int8)  # [tile, columns]
        # As for logits, sums that start at the bits of a large float are floats without a conversion.
        raw = [lax.bitcast_convert_type(_pv(v, byte) + SIGNED_ANCHOR_BITS, jnp.float32) for v in tiles]
        sums = [(r - SIGNED_ANCHOR) * beta[None, :] for r in raw]  # [width, columns] each
    else:
        high, low = bytes_of(integers(p))  # [tile, columns] each
        again = load_tiles(x.pages.values.packed, part, where, 0, shifts, plan, again=True)
        whole = [(_pv(v, high) << BYTE_BITS) + _pv(u, low) for v, u in zip(tiles, again, strict=True)]
        sums = [s.astype(jnp.float32) * beta[None, :] for s in whole]  # [width, columns] each
    acc = tuple(a * alpha[None, :] + s for a, s in zip(acc, sums, strict=True))
    weights = p  # [tile, columns]
    if part.unsigned:
        zero = jnp.where(seen, load_scale(x.pages.values.zero, part, where, plan), 0.0)  # [tile]
        # Tiles hold codes less this, in units of the scale.
        middle = float(1 << (part.book.bits - 1))
        weights = p * (zero * inverse + middle)[:, None]
    offset = offset * alpha[None, :] + _fold(weights, plan) * beta[None, :]  # [folded_rows, columns]
    return (acc, new_reference, offset), p, alpha, beta


def _pv(values: jax.Array, p: jax.Array) -> jax.Array:
    """Product [width, columns] of values [width, tile] with p [tile, columns], int32."""
    return lax.dot_general(values, p, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _store_acc(parts: tuple, ref: Any, lead: tuple, first: jax.Array, plan: DecodePlan) -> None:
    """Writes the sums of all parts to ref [*lead, query rows, d], relative to the reference of the first part."""
    common = parts[0][1]  # [columns]
    for part, (acc, reference, offset) in zip(plan.values, parts, strict=True):
        factor = exp2(reference - common, interpret=plan.interpret)  # [columns]
        offset = jnp.sum(offset, axis=0)  # [columns]
        # Half of sum(p) for half-integers, or the zeros of min-max values; both columns of a pair have all of it.
        offset = offset * ((1.0 if part.unsigned else 0.5) * (0.5 if plan.pairs else 1.0))
        factor = factor if part.unsigned else factor * part.book.step
        for tile, sums in zip(part.tiles, acc, strict=True):
            out = sums * weight_of_byte(plan)[None, :] if plan.pairs else sums  # [width, columns]
            out = (out + offset[None, :]) * factor[None, :]
            if plan.pairs:
                out = jnp.sum(out.reshape(tile.width, -1, 2), axis=2)  # [width, columns / 2]
            column = first + lax.broadcasted_iota(jnp.int32, (out.shape[1],), 0)  # [query rows]
            shape = out.shape
            channel = lax.broadcasted_iota(jnp.int32, shape, 0)  # [width, query rows]
            mask = jnp.broadcast_to((column < plan.count * plan.group)[None, :], shape)
            if tile.valid < tile.width:
                mask = mask & (channel < tile.valid)
            index = [jnp.broadcast_to(i, shape) for i in (*lead, column[None, :])]
            plt.store(ref.at[(*index, part.channel + tile.start + channel)], out, mask=mask)
