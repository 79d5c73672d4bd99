"""The prefill kernel: one program attends with a block of query rows over a run of tiles of one sequence and KV head.

Query rows are the rows and tokens the columns of the logits, so that a tile is decoded once for up to 256 rows:

    logits [rows, tokens] = q @ keys [tokens, channels]^T
    acc [rows, channels] += p @ values [channels, tokens]^T

All operands are float16: keys and values are centroids times the scale of their token, exact but for the rounding of
that product; queries are divided by the largest channel of their row, and p is at most 2**HEADROOM.
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

from pallas_kernels.decode.layout import Part, Tile
from pallas_kernels.decode.options import LogitOptions
from pallas_kernels.lookup_triton import exp2, log2, tanh
from pallas_kernels.prefill.half import UNIT, centroid_tile, fma, min_max_tile
from pallas_kernels.prefill.load import Where, load_scalars, load_tiles

LOG2_E = math.log2(math.e)

HIDDEN = -1e38
"""Logit, before its row's factor, of a key that is not seen."""

HEADROOM = 8.0
"""log2 of the largest p of a row: float16 keeps its precision for p down to 2**-14."""


FLOOR = -1e18
"""Least peak of a row; above HIDDEN times any factor, so that hidden keys vanish even where there are no others."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a kernel.

    Attributes:
        keys: Parts of the keys.
        values: Parts of the values.
        options: Logit options.
        count: Query tokens.
        group: Query heads a KV head.
        rows: Query rows a program.
        tile: Tokens a step.
        page_size: Tokens a page.
        splits: Programs a block of rows.
        interpret: Whether the kernel runs as jnp.
    """

    keys: tuple[Part, ...]
    values: tuple[Part, ...]
    options: LogitOptions
    count: int
    group: int
    rows: int
    tile: int
    page_size: int
    splits: int
    interpret: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of the kernel, or its references; see `prefill_attention`.

    `query` is float16 [b, t, h_q, channels of all key parts], at most one, and `factor` [b, t, h_q] what its products
    with key tiles are multiplied by.
    """

    query: Any
    factor: Any
    pages: Any
    table: Any
    lengths: Any
    positions: Any
    bias: Any


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The query rows of a program: [rows] each of sequence, query token, query head and whether the row exists."""

    sequence: jax.Array
    token: jax.Array
    head: jax.Array
    exists: jax.Array


def attend(x: Inputs, out_ref: Any, peak_ref: Any, *, plan: Plan) -> None:
    """The kernel body; writes its split of out [splits, b, t, h_q, d] and peak [splits, b, t, h_q].

    `out` is normalized and `peak` the base-2 log of the sum of exponentials, FLOOR where no key is visible.
    """
    block, split, lead = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    kv_heads = jnp.int32(x.pages.values.packed.shape[1])
    sequence, kv_head = lax.div(lead, kv_heads), lax.rem(lead, kv_heads)
    rows = _rows(block, sequence, kv_head, plan)
    position = plt.load(x.positions.at[rows.sequence, rows.token], mask=rows.exists, other=0)
    begin, middle, end = _tiles_of_split(x, sequence, split, rows, position, plan)
    queries = _load_queries(x, rows, plan)
    factor = plt.load(x.factor.at[rows.sequence, rows.token, rows.head], mask=rows.exists, other=1.0)
    bias = None
    if x.bias is not None:
        bias = plt.load(x.bias.at[rows.sequence, rows.token, rows.head], mask=rows.exists, other=0.0) * LOG2_E

    def table_page(index: jax.Array) -> jax.Array:
        return x.table[sequence, jnp.minimum(_page(index, plan), x.table.shape[1] - 1)]

    def key_scales(page: jax.Array, index: jax.Array) -> tuple[jax.Array, ...]:
        where, keys = (page, kv_head, _slot(index, plan)), x.pages.keys
        refs = [keys.residual if part.sketch else keys.scale for part in plan.keys]
        return tuple(load_scalars(r, p, where, tokens=plan.tile) for r, p in zip(refs, plan.keys, strict=True))

    def step(index: jax.Array, state: tuple, *, masked: bool) -> tuple:
        page, scales, acc, peak, total = state
        # Read a step early: what loads wait for, and what Triton does not pipeline, being two bytes a thread.
        following = table_page(index + 1)
        ahead = (following, key_scales(following, index + 1))
        where = (page, kv_head, _slot(index, plan))
        tokens = index * plan.tile + lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)
        seen = tokens < x.lengths[sequence] if masked else None
        logits, slope = _logits(x, where, seen, scales, queries, plan), factor
        if plan.options.softcap is not None:
            logits, slope = _soft_capped(logits * factor[:, None], bias, plan), jnp.ones_like(factor)
        if seen is not None:
            logits = jnp.where(_visible(tokens, position, plan) & seen[None, :], logits, HIDDEN)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1) * slope)
        exponent = fma(logits, slope[:, None], (HEADROOM - new_peak)[:, None], interpret=plan.interpret)
        p = exp2(exponent, interpret=plan.interpret)
        alpha = exp2(peak - new_peak, interpret=plan.interpret)
        total = total * alpha + jnp.sum(p, axis=1)
        weights, values = p.astype(jnp.float16), _values(x, where, seen, plan)
        acc = tuple(_dot(weights, v, a * alpha[:, None]) for a, v in zip(acc, values, strict=True))
        return *ahead, acc, new_peak, total

    acc = tuple(jnp.zeros((plan.rows, t.width), jnp.float32) for part in plan.values for t in part.tiles)
    peak = jnp.full((plan.rows,), FLOOR, jnp.float32)
    first = table_page(begin)
    state = (first, key_scales(first, begin), acc, peak, jnp.zeros_like(peak))
    if plan.options.sliding_window is None:
        state = lax.fori_loop(begin, middle, lambda i, s: step(i, s, masked=False), state)
    state = lax.fori_loop(middle, end, lambda i, s: step(i, s, masked=True), state)
    *_, acc, peak, total = state
    if bias is not None and plan.options.softcap is None:
        # The bias is the same for all keys of a query.
        peak = peak + bias
    _store(acc, peak, total, out_ref, peak_ref, split, rows, plan)


def _rows(block: jax.Array, sequence: jax.Array, kv_head: jax.Array, plan: Plan) -> _Rows:
    row = block * plan.rows + lax.broadcasted_iota(jnp.int32, (plan.rows,), 0)
    group = jnp.full_like(row, plan.group)
    return _Rows(
        sequence=jnp.full_like(row, sequence),
        token=lax.div(row, group),
        head=kv_head * plan.group + lax.rem(row, group),
        exists=row < plan.count * plan.group,
    )


def _page(index: jax.Array, plan: Plan) -> jax.Array:
    """Place in the block table of a tile. Remainders are those of C, whose divisibility Triton understands."""
    return lax.div(index, jnp.int32(plan.page_size // plan.tile))


def _slot(index: jax.Array, plan: Plan) -> jax.Array:
    """First token of a tile in its page."""
    return lax.rem(index, jnp.int32(plan.page_size // plan.tile)) * plan.tile


def _tiles_of_split(
    x: Inputs, sequence: jax.Array, split: jax.Array, rows: _Rows, position: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The run of tiles of this program, an equal share of those that any row sees, and where masking starts in it."""
    tile = jnp.int32(plan.tile)
    first = jnp.min(jnp.where(rows.exists, position, jnp.int32(2**30)))
    last = jnp.max(position)
    stop = lax.div(jnp.maximum(jnp.minimum(x.lengths[sequence], last + 1), 0) + (plan.tile - 1), tile)
    start = jnp.int32(0)
    if plan.options.sliding_window is not None:
        start = lax.div(jnp.maximum(first - (plan.options.sliding_window - 1), 0), tile)
    share = lax.div(jnp.maximum(stop - start, 0) + (plan.splits - 1), jnp.int32(plan.splits))
    begin = jnp.minimum(start + split * share, stop)
    end = jnp.minimum(begin + share, stop)
    if plan.options.sliding_window is not None:
        return begin, begin, end
    # Full tiles that no query is before are seen by all.
    whole = lax.div(jnp.maximum(jnp.minimum(x.lengths[sequence], first + 1), 0), tile)
    return begin, jnp.clip(whole, begin, end), end


def _visible(tokens: jax.Array, position: jax.Array, plan: Plan) -> jax.Array:
    """Which keys [rows, tile] each row sees, by position alone."""
    visible = tokens[None, :] <= position[:, None]
    if plan.options.sliding_window is not None:
        visible = visible & (tokens[None, :] > position[:, None] - plan.options.sliding_window)
    return visible


def _load_queries(x: Inputs, rows: _Rows, plan: Plan) -> list[jax.Array]:
    """float16 queries [rows, width] of every key tile."""
    tiles, start = [], 0
    for tile in (tile for part in plan.keys for tile in part.tiles):
        index, mask = _row_channels(rows, start, tile)
        tiles.append(plt.load(x.query.at[tuple(index)], mask=mask, other=0.0))
        start += tile.valid
    return tiles


def _row_channels(rows: _Rows, start: int, tile: Tile) -> tuple[list[jax.Array], jax.Array]:
    """Indices [rows, width] of the channels of a tile, of which the first is `start`, and which exist."""
    shape = (rows.token.shape[0], tile.width)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = jnp.broadcast_to(rows.exists[:, None], shape)
    if tile.valid < tile.width:
        mask = mask & (channel < tile.valid)
    return [
        *(jnp.broadcast_to(i[:, None], shape) for i in (rows.sequence, rows.token, rows.head)),
        start + channel,
    ], mask


def _logits(
    x: Inputs, where: Where, seen: jax.Array | None, scales: tuple[jax.Array, ...], queries: list[jax.Array], plan: Plan
) -> jax.Array:
    """Logits [rows, tile] before the factor of their row."""
    tiles = []
    for part, scale in zip(plan.keys, scales, strict=True):
        packed = x.pages.keys.signs if part.sketch else x.pages.keys.packed
        known = _known(scale, seen)[:, None]
        convert = functools.partial(centroid_tile, book=part.book, scale=known, interpret=plan.interpret)
        tiles += load_tiles(packed, part, where, convert, axis=1, tokens=plan.tile)
    logits = jnp.zeros((plan.rows, plan.tile), jnp.float32)
    for query, tile in zip(queries, tiles, strict=True):
        logits = _dot(query, tile, logits)
    return logits


def _known(scalar: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Scalars of the tokens of a tile, zero where not seen."""
    return scalar if seen is None else jnp.where(seen, scalar, 0.0)


def _soft_capped(logits: jax.Array, bias: jax.Array | None, plan: Plan) -> jax.Array:
    """Biased and capped logits [rows, tile] times log2(e)."""
    cap = plan.options.softcap
    assert cap is not None
    logits = logits if bias is None else logits + bias[:, None]
    return cap * LOG2_E * tanh(logits * (1.0 / (cap * LOG2_E)), interpret=plan.interpret)


def _values(x: Inputs, where: Where, seen: jax.Array | None, plan: Plan) -> list[jax.Array]:
    """float16 tiles [width, tile] of all value parts, of codebooks in units of UNIT steps; zero where not seen."""
    values, out = x.pages.values, []
    for part in plan.values:
        scale = _known(load_scalars(values.scale, part, where, tokens=plan.tile), seen)[None, :]
        if part.unsigned:
            zero = _known(load_scalars(values.zero, part, where, tokens=plan.tile), seen)[None, :]
            convert = functools.partial(min_max_tile, scale=scale, zero=zero, interpret=plan.interpret)
        else:
            convert = functools.partial(centroid_tile, book=part.book, scale=scale, interpret=plan.interpret)
        out += load_tiles(values.packed, part, where, convert, axis=0, tokens=plan.tile)
    return out


def _dot(a: jax.Array, b: jax.Array, start: jax.Array) -> jax.Array:
    """Returns start + a @ b^T."""
    return start + lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _store(
    acc: tuple,
    peak: jax.Array,
    total: jax.Array,
    out_ref: Any,
    peak_ref: Any,
    split: jax.Array,
    rows: _Rows,
    plan: Plan,
) -> None:
    seen = total > 0
    known = jnp.where(seen, total, 1.0)
    lead = [jnp.full_like(rows.sequence, split), rows.sequence, rows.token, rows.head]
    log_sum = jnp.where(seen, peak - HEADROOM + log2(known, interpret=plan.interpret), FLOOR)
    plt.store(peak_ref.at[tuple(lead)], log_sum, mask=rows.exists)
    tiles = [(part, tile) for part in plan.values for tile in part.tiles]
    for (part, tile), sums in zip(tiles, acc, strict=True):
        index, mask = _row_channels(rows, part.channel + tile.start, tile)
        unit = 1.0 if part.unsigned else part.book.step * UNIT
        at = out_ref.at[(jnp.full(sums.shape, split, jnp.int32), *index)]
        plt.store(at, sums * (unit / known)[:, None], mask=mask)
