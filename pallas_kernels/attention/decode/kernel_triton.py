"""The decode kernel: one program attends over a run of tiles of one sequence and KV head.

Tokens are the rows and queries the columns of every product, so that queries pad to 8 and not to 16:

    logits [tokens, queries] = keys [tokens, channels] @ q^T
    acc [channels, queries] += values [channels, tokens] @ p

Both products take int8 half-integers m of centroids (m + 1/2) * step; q is an integer of two bytes with one scale a
row, and so is p times the value scale, with one scale a tile and row. The halves leave the tiles as sum(q) / 2 and
sum(p) / 2. Value scales enter as logarithms: w = logit + log2(scale), p * scale = 2**(w - max w), and the largest
integer of a tile is exactly the top. Where columns would be padding, high and low bytes are columns side by side, at no
price; else p takes two products, and q has one byte unless it shall be precise.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.decode.plan import TWO_BYTES, Inputs, Plan
from pallas_kernels.numerics import FLOOR, HIDDEN, LOG2_E, SIGNED_ANCHOR, SIGNED_ANCHOR_BITS
from pallas_kernels.tiles.int8_triton import mixed_index
from pallas_kernels.tiles.intrinsics_triton import at_least, exp2, log2, tanh
from pallas_kernels.tiles.layout import Part
from pallas_kernels.tiles.loads_triton import load_scale, load_shifts, load_tiles, page_of, slot_of

LEAST_SCALE = 2.0**-100
"""Value scales below it are taken for it; its inverse times 127 is still a float."""


def attend(x: Inputs, acc_ref: Any, peak_ref: Any, total_ref: Any, *, plan: Plan) -> None:
    """The kernel body; writes acc [queries, channels] and peak, total [columns] of its split, exponents base 2."""
    # Blocks of columns of the same tiles come side by side, so that the second one finds them in the cache.
    program, row, head = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    split, block = lax.div(program, jnp.int32(plan.blocks)), lax.rem(program, jnp.int32(plan.blocks))
    column = block * plan.columns + lax.broadcasted_iota(jnp.int32, (plan.columns,), 0)
    token, head_column = _query_index(column, head, plan)
    begin, end = _tiles_of_split(x, row, split, plan)
    queries = [_quantized_query(x, part, row, token, head_column, plan) for part in plan.keys]
    bias = None
    if x.bias is not None:
        bias = plt.load(x.bias.at[jnp.full_like(token, row), token, head_column]) * _logit_unit(plan)
    position = None
    if plan.count > 1:
        position = plt.load(x.positions.at[jnp.full_like(token, row), token])
    shifts = load_shifts(x, plan)

    def step(index: jax.Array, state: tuple) -> tuple:
        page, parts, total = state
        # Read a step early: the loads of the next tile wait for its page.
        following = page_of(x, row, index + 1, plan)
        where = (page, head, slot_of(index, plan))
        tokens = index * plan.tile + lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)
        seen = _seen_tokens(x, row, tokens, plan)
        visible = None if position is None else _visible(tokens, position, plan)
        exponents, inverses = zip(*(_exponent(x, part, where, seen, plan) for part in plan.values), strict=True)
        # One part's exponent is what the logits accumulate onto: a fused multiply-add less.
        alone = len(exponents) == 1 and plan.options.softcap is None
        logits = _logits(x, where, seen, queries, bias, exponents[0] if alone else None, shifts, plan)
        updated = []
        for i, part in enumerate(plan.values):
            w = logits if alone else logits + exponents[i][:, None]
            if visible is not None:
                w = jnp.where(visible, w, HIDDEN)
            new, p, alpha, beta = _accumulate(x, part, where, w, inverses[i], seen, parts[i], shifts, plan)
            updated.append(new)
            if i == 0:
                total = total * alpha[None, :] + _fold(p * inverses[i][:, None], plan) * beta[None, :]
        return following, tuple(updated), total

    parts = tuple(_empty_part(part, plan) for part in plan.values)
    state = page_of(x, row, begin, plan), parts, _folded_zeros(plan)
    _, parts, total = lax.fori_loop(begin, end, step, state)
    _store_acc(parts, acc_ref, (row, head, split), block * plan.columns, plan)
    peak, total = parts[0][1], jnp.sum(total, axis=0)
    if plan.pairs:
        peak, total = (jnp.max(x.reshape(-1, 2), axis=1) for x in (peak, total))
    columns = pl.ds(block * plan.columns, peak.shape[0])
    peak_ref[row, head, split, columns] = peak
    total_ref[row, head, split, columns] = total


def _logit_unit(plan: Plan) -> float:
    """Factor of queries and biases: log2(e), or 1 / cap with a soft-cap, whose tanh then needs no factor of its own."""
    return LOG2_E if plan.options.softcap is None else 1.0 / plan.options.softcap


def _query_index(column: jax.Array, head: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Query token and query head of each column; columns behind the last query repeat it."""
    column = jnp.minimum(column >> 1 if plan.pairs else column, plan.count * plan.group - 1)
    if plan.count == 1:
        return jnp.zeros_like(column), head * plan.group + column
    group = jnp.full_like(column, plan.group)
    return lax.div(column, group), head * plan.group + lax.rem(column, group)


def _weight_of_byte(plan: Plan) -> jax.Array:
    """What the integers of each column count: 256 for high bytes and 1 for low ones."""
    return jnp.where((lax.broadcasted_iota(jnp.int32, (plan.columns,), 0) & 1) == 0, 256.0, 1.0)


def _pair_sums(x: jax.Array, plan: Plan) -> jax.Array:
    """Sums of pairs of columns [n, columns], in both; a thread holds both."""
    pairs = x.reshape(-1, plan.columns // 2, 2)
    return jnp.broadcast_to(jnp.sum(pairs, axis=2, keepdims=True), pairs.shape).reshape(x.shape)


def _tiles_of_split(x: Inputs, row: jax.Array, split: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The run of tiles of this program: an equal share of those that any query sees."""
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


def _seen_tokens(x: Inputs, row: jax.Array, tokens: jax.Array, plan: Plan) -> jax.Array:
    """Tokens [tile] that exist and, for a single query, that it sees."""
    stop = x.lengths[row]
    if plan.count > 1:
        return tokens < stop
    position = x.positions[row, 0]
    seen = tokens < jnp.minimum(stop, position + 1)
    if plan.options.sliding_window is not None:
        seen = seen & (tokens > position - plan.options.sliding_window)
    return seen


def _visible(tokens: jax.Array, position: jax.Array, plan: Plan) -> jax.Array:
    """Which keys [tile, columns] each of several queries sees, by position alone."""
    visible = tokens[:, None] <= position[None, :]
    if plan.options.sliding_window is not None:
        visible = visible & (tokens[:, None] > position[None, :] - plan.options.sliding_window)
    return visible


@dataclasses.dataclass(frozen=True)
class _Query:
    """A quantized query: operands [width, columns] of each tile, half their sums, the factors of logits."""

    tiles: list[tuple[jax.Array, ...]]
    half: jax.Array
    factor: jax.Array


def _quantized_query(x: Inputs, part: Part, row: jax.Array, token: jax.Array, head: jax.Array, plan: Plan) -> _Query:
    source = x.sketch if part.sketch else x.query
    tiles, largest = [], jnp.zeros((plan.columns,), jnp.float32)
    for tile in part.tiles:
        # Channels first: shared memory then has them side by side, as 8-bit products contract them.
        shape = (tile.width, plan.columns)
        channel = lax.broadcasted_iota(jnp.int32, shape, 0)
        start: jax.Array | int = tile.start
        if tile.partner is not None:
            partner, channel = mixed_index(channel)
            start, channel = jnp.where(partner, tile.partner, tile.start), channel + 2 * tile.half
        index = [jnp.broadcast_to(i[None, :], shape) for i in (jnp.full_like(token, row), token, head)]
        at = source.at[(*index, part.channel + start + channel)]
        whole = tile.valid == tile.width
        tiles.append(plt.load(at) if whole else plt.load(at, mask=channel < tile.valid, other=0.0))
        largest = jnp.maximum(largest, jnp.max(jnp.abs(tiles[-1]), axis=0))
    largest = jnp.maximum(largest, 1e-30)
    total = jnp.zeros((plan.columns,), jnp.int32)
    quantized = []
    for q in tiles:
        integer = _integers(q * (plan.query_top / largest)[None, :])
        if plan.pairs:
            integer = _byte_of_column(integer, plan)
        total = total + jnp.sum(integer, axis=0)
        quantized.append(_bytes_of(integer) if plan.precise and not plan.pairs else (integer.astype(jnp.int8),))
    factor = largest * (part.book.step * plan.options.scale * _logit_unit(plan) / plan.query_top)
    if plan.pairs:
        factor = factor * _weight_of_byte(plan)
    # The half of a step that an odd sum loses is 1e-5 of a logit.
    return _Query(quantized, total // 2, factor)


def _integers(x: jax.Array) -> jax.Array:
    """Nearest int32 of floats up to 2**22."""
    return lax.bitcast_convert_type(x + SIGNED_ANCHOR, jnp.int32) - SIGNED_ANCHOR_BITS


def _bytes_of(integer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An integer of up to TWO_BYTES as signed bytes, the high one first."""
    high = (integer + 128) >> 8
    return high.astype(jnp.int8), (integer - (high << 8)).astype(jnp.int8)


def _byte_of_column(integer: jax.Array, plan: Plan) -> jax.Array:
    """The signed byte of integers [n, columns] that each column of pairs holds."""
    high = (integer + 128) >> 8
    odd = (lax.broadcasted_iota(jnp.int32, integer.shape, 1) & 1) == 1
    return jnp.where(odd, integer - (high << 8), high)


def _logits(
    x: Inputs,
    where: tuple,
    seen: jax.Array,
    queries: list[_Query],
    bias: jax.Array | None,
    start: jax.Array | None,
    shifts: dict,
    plan: Plan,
) -> jax.Array:
    """Logits [tile, columns] times log2(e), biased, soft-capped, plus start [tile]; finite where not seen."""
    keys = x.pages.keys
    shape = (plan.tile, plan.columns)
    logits = None if start is None else jnp.broadcast_to(start[:, None], shape)
    if bias is not None:
        logits = bias[None, :] + jnp.zeros(shape, jnp.float32) if logits is None else logits + bias[None, :]
    for part, query in zip(plan.keys, queries, strict=True):
        scales = keys.residual if part.sketch else keys.scale
        scale = jnp.where(seen, load_scale(scales, part, where, plan), 0.0)
        source = keys.signs if part.sketch else keys.packed
        tiles = load_tiles(source, part, where, 1, shifts, plan)
        if plan.precise and not plan.pairs:
            again = load_tiles(source, part, where, 1, shifts, plan, again=True)
            product = [
                _products(t, [q[i] for q in query.tiles], jnp.zeros(shape, jnp.int32))
                for i, t in enumerate((tiles, again))
            ]
            whole = (product[0] << 8) + product[1] + query.half[None, :]
            term = whole.astype(jnp.float32) * scale[:, None]
        else:
            # Accumulation starts at the bits of a large float, which makes the sum one without conversion.
            large = jnp.broadcast_to((query.half + SIGNED_ANCHOR_BITS)[None, :], shape)
            raw = lax.bitcast_convert_type(_products(tiles, [q[0] for q in query.tiles], large), jnp.float32)
            term = (raw - SIGNED_ANCHOR) * scale[:, None]
        term = term * query.factor[None, :]
        if plan.pairs:
            term = _pair_sums(term, plan)
        logits = term if logits is None else term + logits
    assert logits is not None
    cap = plan.options.softcap
    return logits if cap is None else cap * LOG2_E * tanh(logits, interpret=plan.interpret)


def _products(tiles: list[jax.Array], queries: list[jax.Array], start: jax.Array) -> jax.Array:
    for tile, query in zip(tiles, queries, strict=True):
        start = start + lax.dot_general(tile, query, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return start


def _exponent(x: Inputs, part: Part, where: tuple, seen: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """log2 of the scales [tile] of a value part, HIDDEN where not seen, and their inverses, any number there."""
    scale = load_scale(x.pages.values.scale, part, where, plan)
    if plan.interpret:
        # Compiled, the maximum of NaN and a number is the number.
        scale = jnp.where(seen, scale, 1.0)
    exponent = log2(at_least(scale, LEAST_SCALE, interpret=plan.interpret), interpret=plan.interpret)
    return jnp.where(seen, exponent, HIDDEN), exp2(-exponent, interpret=plan.interpret)


def _folded_zeros(plan: Plan) -> jax.Array:
    return jnp.zeros((min(plan.tile, 16 * plan.num_warps), plan.columns), jnp.float32)


def _fold(x: jax.Array, plan: Plan) -> jax.Array:
    """Sums of [tile, columns] over the rows that one thread holds: what is left is summed once, after the last tile."""
    return jnp.sum(x.reshape(-1, min(plan.tile, 16 * plan.num_warps), plan.columns), axis=0)


def _empty_part(part: Part, plan: Plan) -> tuple:
    """Accumulators of a value part: tiles, reference exponent, sum of p and sum of p * zero."""
    acc = tuple(jnp.zeros((tile.width, plan.columns), jnp.float32) for tile in part.tiles)
    return acc, jnp.full((plan.columns,), FLOOR, jnp.float32), _folded_zeros(plan)


def _accumulate(
    x: Inputs,
    part: Part,
    where: tuple,
    w: jax.Array,
    inverse: jax.Array,
    seen: jax.Array,
    state: tuple,
    shifts: dict,
    plan: Plan,
) -> tuple[tuple, jax.Array, jax.Array, jax.Array]:
    """Adds a tile to a value part; returns the part, p * scale, and the factors of what was and of what came."""
    acc, reference, offset = state
    tile_reference = jnp.maximum(jnp.max(w, axis=0) - math.log2(TWO_BYTES), FLOOR)
    p = exp2(w - tile_reference[None, :], interpret=plan.interpret)
    new_reference = jnp.maximum(reference, tile_reference)
    alpha = exp2(reference - new_reference, interpret=plan.interpret)
    beta = exp2(tile_reference - new_reference, interpret=plan.interpret)
    tiles = load_tiles(x.pages.values.packed, part, where, 0, shifts, plan)
    if plan.pairs:
        byte = _byte_of_column(_integers(p), plan).astype(jnp.int8)
        # As for logits, starting at the bits of a large float makes sums floats without conversion.
        raw = [lax.bitcast_convert_type(_pv(v, byte) + SIGNED_ANCHOR_BITS, jnp.float32) for v in tiles]
        sums = [(r - SIGNED_ANCHOR) * beta[None, :] for r in raw]
    else:
        high, low = _bytes_of(_integers(p))
        again = load_tiles(x.pages.values.packed, part, where, 0, shifts, plan, again=True)
        whole = [(_pv(v, high) << 8) + _pv(u, low) for v, u in zip(tiles, again, strict=True)]
        sums = [s.astype(jnp.float32) * beta[None, :] for s in whole]
    acc = tuple(a * alpha[None, :] + s for a, s in zip(acc, sums, strict=True))
    weights = p
    if part.unsigned:
        zero = jnp.where(seen, load_scale(x.pages.values.zero, part, where, plan), 0.0)
        middle = float(1 << (part.book.bits - 1))
        weights = p * (zero * inverse + middle)[:, None]
    offset = offset * alpha[None, :] + _fold(weights, plan) * beta[None, :]
    return (acc, new_reference, offset), p, alpha, beta


def _pv(values: jax.Array, p: jax.Array) -> jax.Array:
    return lax.dot_general(values, p, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _store_acc(parts: tuple, ref: Any, lead: tuple, first: jax.Array, plan: Plan) -> None:
    """Writes the accumulators of all parts, relative to the reference of the first."""
    common = parts[0][1]
    for part, (acc, reference, offset) in zip(plan.values, parts, strict=True):
        factor = exp2(reference - common, interpret=plan.interpret)
        offset = jnp.sum(offset, axis=0)
        # What the halves of integers amount to, and the zeros of min-max values; both columns of a pair have all of it.
        offset = offset * ((1.0 if part.unsigned else 0.5) * (0.5 if plan.pairs else 1.0))
        factor = factor if part.unsigned else factor * part.book.step
        for tile, sums in zip(part.tiles, acc, strict=True):
            out = sums * _weight_of_byte(plan)[None, :] if plan.pairs else sums
            out = (out + offset[None, :]) * factor[None, :]
            if plan.pairs:
                out = jnp.sum(out.reshape(tile.width, -1, 2), axis=2)
            column = first + lax.broadcasted_iota(jnp.int32, (out.shape[1],), 0)
            shape = out.shape
            channel = lax.broadcasted_iota(jnp.int32, shape, 0)
            mask = jnp.broadcast_to((column < plan.count * plan.group)[None, :], shape)
            if tile.valid < tile.width:
                mask = mask & (channel < tile.valid)
            index = [jnp.broadcast_to(i, shape) for i in (*lead, column[None, :])]
            plt.store(ref.at[(*index, part.channel + tile.start + channel)], out, mask=mask)
