"""The prefill kernel: one program attends with a block of query rows over a run of tiles of one sequence and KV head.

Query rows are the rows and tokens the columns of the logits, so that a tile is decoded once for up to 256 query rows:

    logits [rows, tile] = q @ keys [tile, channels]^T
    acc [rows, channels] += p @ values [channels, tile]^T

All operands are float16. Keys and values are centroids times the scale of their token, exact but for the rounding of
that product. Queries arrive multiplied by every factor of the logits, and p is at most 2**HEADROOM.

Words: a query row is a query token and a query head of the program's KV head, numbered token * group + head; the base
is the base-2 exponent that the sums of a row are relative to, HEADROOM below its largest logit.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.page_plan import PagePlan
from pallas_kernels.numerics import FLOOR, HIDDEN, LOG2_E
from pallas_kernels.pytree import pytree
from pallas_kernels.tiles.float16_triton import UNIT, centroid_tile, min_max_tile
from pallas_kernels.tiles.intrinsics_triton import exp2, log2, tanh
from pallas_kernels.tiles.layout import Tile
from pallas_kernels.tiles.loads_triton import load_fields, load_scale, load_shifts, page_of, slot_of
from pallas_kernels.tiles.pool_ref import pool_refs

HEADROOM = 8.0
"""log2 of the largest p of a row: float16 keeps its precision for p down to 2**-14."""

LEAST_TILE = 32
"""Tokens of a tile that is not halved where logits are masked."""

MARKS = (3, 1, 2)
"""Numbers that the kernel also loads: differences are zeros that the compiler cannot know.

XLA would write equal or consecutive numbers by a kernel of its own.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillPlan(PagePlan):
    """Static configuration of the prefill kernel, whose splits are per block of query rows.

    Attributes:
        rows: Query rows per program.
    """

    rows: int


@pytree
class PrefillInputs:
    """Arrays of the kernel, or its references.

    Attributes:
        query: float16 [b, t, h_q, channels of all key parts]; its products with key tiles are logits times log2(e).
        pages: `Pages` of arrays as `tiles.pool_ref.addressed` makes them.
        table: int32 [b, n], page of each run of page_size tokens.
        lengths: int32 [b], tokens in the pages.
        positions: int32 [b, blocks, rows], position of each query row of each block, counted like the tokens.
        bounds: int32 [b, blocks, 2], the least and the largest of these positions.
        bias: float32 [b, t, h_q], added to the logits of a query; None for zero.
        shifts: int8, see `shift_table`; None where no tile needs shifts.
        marks: uint8 [3], MARKS.
    """

    query: Any
    pages: Any
    table: Any
    lengths: Any
    positions: Any
    bounds: Any
    bias: Any
    shifts: Any = None
    marks: Any = None


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The program's work: block, split, sequence and KV head are numbers; the others are [rows], one per query row.

    Attributes:
        block: Block of query rows.
        split: Split of the tokens.
        sequence: Sequence of the batch.
        kv_head: KV head.
        token: Query token.
        head: Query head.
        exists: Whether the query row exists; the last block has rows behind the last one.
    """

    block: jax.Array
    split: jax.Array
    sequence: jax.Array
    kv_head: jax.Array
    token: jax.Array
    head: jax.Array
    exists: jax.Array

    def load(self, ref: Any, other: float) -> jax.Array:
        """One number per query row, [rows], of an array [b, t, h_q]."""
        return plt.load(
            ref.at[jnp.full_like(self.token, self.sequence), self.token, self.head], mask=self.exists, other=other
        )


def attend(x: PrefillInputs, out_ref: Any, peak_ref: Any, *, plan: PrefillPlan) -> None:
    """The kernel body; program (block, split, sequence * h_kv + KV head) writes its split.

    Args:
        x: References, see `PrefillInputs`.
        out_ref: float32 [splits, b, t, h_q, d], attention over the tokens of the split, normalized, in the rotated
            basis of values.
        peak_ref: float32 [splits, b, t, h_q], base-2 log of the sum of exponentials; FLOOR where no key is visible.
        plan: Static configuration.
    """
    x = dataclasses.replace(x, pages=pool_refs(x.pages, plan.pools, interpret=plan.interpret))
    rows = _rows(x, plan)
    tiles = _tiles_of_split(x, rows, plan)
    queries = _load_queries(x, rows, plan)  # [rows, width] each
    shifts = load_shifts(x, plan)
    acc = tuple(jnp.zeros((plan.rows, t.width), jnp.float32) for part in plan.values for t in part.tiles)
    base = jnp.full((plan.rows,), FLOOR, jnp.float32)  # [rows]
    sums = (acc, base, jnp.zeros_like(base))  # acc [rows, width] each, base [rows], total [rows]
    if plan.options.sliding_window is None:
        sums = _run(x, rows, tiles[:2], queries, shifts, sums, plan, masked=False)
        rows = _rows(x, plan, 1)
        tiles = _tiles_of_split(x, rows, plan)
    sums = _run(x, rows, tiles[1:], queries, shifts, sums, plan, masked=True)
    _store(x, sums, out_ref, peak_ref, _rows(x, plan, 2), plan)


def _rows(x: PrefillInputs, plan: PrefillPlan, time: int = 0) -> _Rows:
    """The program's query rows; with a `time` above 0 computed anew, so that no register keeps them over a loop."""
    # Zero, which the compiler cannot know.
    zero = x.marks[time].astype(jnp.int32) - MARKS[time] if time else jnp.int32(0)
    block, split, lead = (pl.program_id(axis) + zero for axis in range(3))
    kv_heads = jnp.int32(x.pages.values.packed.shape.page[0])
    kv_head = lax.rem(lead, kv_heads)
    row = block * plan.rows + lax.broadcasted_iota(jnp.int32, (plan.rows,), 0)  # [rows]
    group = jnp.full_like(row, plan.group)
    return _Rows(
        block=block,
        split=split,
        sequence=lax.div(lead, kv_heads),
        kv_head=kv_head,
        token=lax.div(row, group),
        head=kv_head * plan.group + lax.rem(row, group),
        exists=row < plan.count * plan.group,
    )


def _run(
    x: PrefillInputs,
    rows: _Rows,
    tiles: tuple[jax.Array, jax.Array],
    queries: list[jax.Array],
    shifts: dict,
    sums: tuple,
    plan: PrefillPlan,
    *,
    masked: bool,
) -> tuple:
    """Adds a run of tiles to the sums.

    Args:
        x: References.
        rows: The program's query rows.
        tiles: First tile and the one behind the last.
        queries: float16 [rows, width] per key tile.
        shifts: See `load_shifts`.
        sums: acc [rows, width] per value tile, base [rows] and sum of 2**(logit - base) [rows].
        plan: Static configuration.
        masked: Whether some query row does not see some token; such tiles are taken half at a time.
    """
    sequence, kv_head = rows.sequence, rows.kv_head
    # The last token that each query row sees, sliding window aside: [rows].
    limit = jnp.minimum(x.positions[sequence, rows.block], x.lengths[sequence] - 1)
    position = x.positions[sequence, rows.block] if plan.options.sliding_window is not None else limit  # [rows]
    first, last = tiles
    bias = rows.load(x.bias, 0.0) * LOG2_E if x.bias is not None and plan.options.softcap is not None else None
    if masked and plan.tile > LEAST_TILE:
        # Masks take registers, which the logits of half a tile leave.
        plan, first, last = dataclasses.replace(plan, tile=plan.tile // 2), first * 2, last * 2

    def step(index: jax.Array, state: tuple) -> tuple:
        (page, scales, nearer), acc, base, total = state  # pages [] or [tile]
        where = (page, kv_head, slot_of(index, plan))
        # Read early, as Triton pipelines no loads of two bytes per thread: scales by a step, their pages by another.
        ahead = (
            page_of(x, sequence, index + 1, plan),
            _key_scales(x, nearer, kv_head, index + 1, plan),
            page_of(x, sequence, index + 2, plan),
        )
        tokens = index * plan.tile + lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)  # [tile]
        seen = tokens < x.lengths[sequence] if masked else None  # [tile]
        logits = _logits(x, where, scales, queries, shifts, plan)  # [rows, tile]
        if plan.options.softcap is not None:
            logits = _soft_capped(logits, bias, plan)
        if masked:
            logits = jnp.where(_visible(tokens, position, limit, plan), logits, HIDDEN)
        new_base = jnp.maximum(base, jnp.max(logits, axis=1) - HEADROOM)  # [rows]
        p = exp2(logits - new_base[:, None], interpret=plan.interpret)  # [rows, tile]
        alpha = exp2(base - new_base, interpret=plan.interpret)  # [rows]
        total = total * alpha + jnp.sum(p, axis=1)  # [rows]
        weights, values = p.astype(jnp.float16), _values(x, where, seen, shifts, plan)  # values [width, tile] each
        acc = tuple(_dot(weights, v, a * alpha[:, None]) for a, v in zip(acc, values, strict=True))
        return ahead, acc, new_base, total

    page = page_of(x, sequence, first, plan)
    ahead = (page, _key_scales(x, page, kv_head, first, plan), page_of(x, sequence, first + 1, plan))
    return lax.fori_loop(first, last, step, (ahead, *sums))[1:]


def _key_scales(
    x: PrefillInputs, page: jax.Array, kv_head: jax.Array, index: jax.Array, plan: PrefillPlan
) -> list[jax.Array]:
    """float16 scales [tile] per key part of the tile of an index, which is in a page, or in pages [tile]."""
    keys, where = x.pages.keys, (page, kv_head, slot_of(index, plan))
    refs = [keys.residual if part.sketch else keys.scale for part in plan.keys]
    return [load_scale(r, p, where, plan, dtype=jnp.float16) for r, p in zip(refs, plan.keys, strict=True)]


def _tiles_of_split(x: PrefillInputs, rows: _Rows, plan: PrefillPlan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First tile of this program, first one that needs a mask, and the tile behind the last.

    A program has an equal share of the tiles that any of its query rows sees.
    """
    tile, length = jnp.int32(plan.tile), x.lengths[rows.sequence]
    first, last = (x.bounds[rows.sequence, rows.block, i] for i in (0, 1))
    stop = lax.div(jnp.maximum(jnp.minimum(length, last + 1), 0) + (plan.tile - 1), tile)
    start = jnp.int32(0)
    if plan.options.sliding_window is not None:
        start = lax.div(jnp.maximum(first - (plan.options.sliding_window - 1), 0), tile)
    share = lax.div(jnp.maximum(stop - start, 0) + (plan.splits - 1), jnp.int32(plan.splits))
    begin = jnp.minimum(start + rows.split * share, stop)
    end = jnp.minimum(begin + share, stop)
    if plan.options.sliding_window is not None:
        return begin, begin, end
    # Every query row sees the full tiles up to the first query.
    whole = lax.div(jnp.maximum(jnp.minimum(length, first + 1), 0), tile)
    return begin, jnp.clip(whole, begin, end), end


def _visible(tokens: jax.Array, position: jax.Array, limit: jax.Array, plan: PrefillPlan) -> jax.Array:
    """Which tokens [tile] each query row of a position and a limit [rows] sees: [rows, tile]."""
    visible = tokens[None, :] <= limit[:, None]
    if plan.options.sliding_window is not None:
        visible = visible & (tokens[None, :] > position[:, None] - plan.options.sliding_window)
    return visible


def _load_queries(x: PrefillInputs, rows: _Rows, plan: PrefillPlan) -> list[jax.Array]:
    """float16 queries [rows, width] of every key tile."""
    tiles, start = [], 0
    for tile in (tile for part in plan.keys for tile in part.tiles):
        index, mask = _row_channels(rows, start, tile)
        tiles.append(plt.load(x.query.at[tuple(index)], mask=mask, other=0.0))
        start += tile.valid
    return tiles


def _row_channels(rows: _Rows, start: int, tile: Tile) -> tuple[list[jax.Array], jax.Array]:
    """Indices of a tile's channels, from `start` on, in [b, t, h_q, channels], and which exist; [rows, width] each."""
    shape = (rows.token.shape[0], tile.width)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)  # [rows, width]
    mask = jnp.broadcast_to(rows.exists[:, None], shape)  # [rows, width]
    if tile.valid < tile.width:
        mask = mask & (channel < tile.valid)
    return [
        jnp.full(shape, rows.sequence),
        *(jnp.broadcast_to(i[:, None], shape) for i in (rows.token, rows.head)),
        start + channel,
    ], mask


def _logits(
    x: PrefillInputs,
    where: tuple,
    scales: list[jax.Array],
    queries: list[jax.Array],
    shifts: dict,
    plan: PrefillPlan,
) -> jax.Array:
    """Logits [rows, tile] times log2(e), by scales [tile] per key part and queries [rows, width] per key tile."""
    logits, remaining = jnp.zeros((plan.rows, plan.tile), jnp.float32), iter(queries)
    for part, scale in zip(plan.keys, scales, strict=True):
        packed = x.pages.keys.signs if part.sketch else x.pages.keys.packed
        for fields in load_fields(packed, part, where, 1, shifts, plan):
            tile = centroid_tile(fields, part.book, scale[:, None], interpret=plan.interpret)  # [tile, width]
            logits = _dot(next(remaining), tile, logits)
    return logits


def _known(scalar: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Scalars [tile] of the tokens of a tile, zero where not seen [tile]."""
    return scalar if seen is None else jnp.where(seen, scalar, 0.0)


def _soft_capped(logits: jax.Array, bias: jax.Array | None, plan: PrefillPlan) -> jax.Array:
    """Biased (by [rows]) and soft-capped logits [rows, tile] times log2(e)."""
    cap = plan.options.softcap
    assert cap is not None
    logits = logits if bias is None else logits + bias[:, None]
    return cap * LOG2_E * tanh(logits * (1.0 / (cap * LOG2_E)), interpret=plan.interpret)


def _values(x: PrefillInputs, where: tuple, seen: jax.Array | None, shifts: dict, plan: PrefillPlan) -> list[jax.Array]:
    """float16 tiles [width, tile] of all value parts, zero where not seen; codebook values come without UNIT * step."""
    values, out = x.pages.values, []
    for part in plan.values:
        scale = _known(load_scale(values.scale, part, where, plan, dtype=jnp.float16), seen)[None, :]  # [1, tile]
        if part.unsigned:
            zero = _known(load_scale(values.zero, part, where, plan, dtype=jnp.float16), seen)[None, :]  # [1, tile]
            convert = functools.partial(min_max_tile, scale=scale, zero=zero, interpret=plan.interpret)
        else:
            convert = functools.partial(centroid_tile, book=part.book, scale=scale, interpret=plan.interpret)
        out += [convert(fields) for fields in load_fields(values.packed, part, where, 0, shifts, plan)]
    return out


def _dot(a: jax.Array, b: jax.Array, start: jax.Array) -> jax.Array:
    """Returns start [m, n] + a [m, k] @ b [n, k]^T."""
    return start + lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _store(x: PrefillInputs, sums: tuple, out_ref: Any, peak_ref: Any, rows: _Rows, plan: PrefillPlan) -> None:
    """Writes the normalized sums and their base-2 log-sum-exp."""
    acc, base, total = sums  # [rows, width] each, [rows], [rows]
    if x.bias is not None and plan.options.softcap is None:
        # The bias is the same for all keys of a query.
        base = base + rows.load(x.bias, 0.0) * LOG2_E
    seen = total > 0  # [rows]
    known = jnp.where(seen, total, 1.0)
    lead = [*(jnp.full_like(rows.token, i) for i in (rows.split, rows.sequence)), rows.token, rows.head]
    log_sum = jnp.where(seen, base + log2(known, interpret=plan.interpret), FLOOR)  # [rows]
    plt.store(peak_ref.at[tuple(lead)], log_sum, mask=rows.exists)
    tiles = [(part, tile) for part in plan.values for tile in part.tiles]
    for (part, tile), parts in zip(tiles, acc, strict=True):  # parts [rows, width]
        index, mask = _row_channels(rows, part.channel + tile.start, tile)
        unit = 1.0 if part.unsigned else part.book.step * UNIT
        at = out_ref.at[(jnp.full(parts.shape, rows.split), *index)]
        plt.store(at, parts * (unit / known)[:, None], mask=mask)
