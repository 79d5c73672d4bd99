"""Loads of the kernels over pages: scales, planes of codes and int8 tiles of a tile's tokens.

Everywhere below, `pool` is a `PoolRef` to an array of pages. `where` is the page, the KV head and the place in the page
of the tile's first token. If pages hold fewer tokens than a tile, page and place are [tile], one per token; otherwise
they are numbers. `axis` is the axis of channels: 1 for keys, whose tiles are [tile, width], and 0 for values, whose
tiles are [width, tile].
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.tiles.int8_triton import Field, codebook_tile, integer_tile
from pallas_kernels.tiles.layout import Part, Tile, planes_of
from pallas_kernels.tiles.pool_ref import PoolRef


@runtime_checkable
class TilePlan(Protocol):
    """The part of a kernel's plan that loads need: `DecodePlan` and `PrefillPlan` have it."""

    @property
    def keys(self) -> tuple[Part, ...]:
        """Parts of the keys."""
        ...

    @property
    def values(self) -> tuple[Part, ...]:
        """Parts of the values."""
        ...

    @property
    def tile(self) -> int:
        """Tokens per step."""
        ...

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        ...

    @property
    def interpret(self) -> bool:
        """Whether the kernel runs as jnp."""
        ...


def page_of(x: Any, row: jax.Array, index: jax.Array, plan: TilePlan) -> jax.Array:
    """Page of tile number `index` of a sequence or, if pages are smaller, of each of its tokens [tile].

    Quotients and remainders are those of C, whose divisibility Triton understands.

    Args:
        x: References with a block table, `table` int32 [b, n].
        row: The sequence.
        index: Number of the tile.
        plan: Static configuration.
    """
    last = x.table.shape[1] - 1
    if plan.tile <= plan.page_size:
        return x.table[row, jnp.minimum(lax.div(index, jnp.int32(plan.page_size // plan.tile)), last)]
    token = lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)  # [tile]
    place = index * (plan.tile // plan.page_size) + lax.div(token, jnp.full_like(token, plan.page_size))
    return plt.load(x.table.at[jnp.full_like(token, row), jnp.minimum(place, last)])


def slot_of(index: jax.Array, plan: TilePlan) -> jax.Array:
    """Place in its page of a tile's first token or, if pages are smaller, of each of the tile's tokens [tile]."""
    if plan.tile <= plan.page_size:
        return lax.rem(index, jnp.int32(plan.page_size // plan.tile)) * plan.tile
    token = lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)  # [tile]
    return lax.rem(token, jnp.full_like(token, plan.page_size))


def load_scale(pool: PoolRef, part: Part, where: tuple, plan: TilePlan, *, dtype: Any = jnp.float32) -> jax.Array:
    """Scales [tile] of a part, from pages of [h_kv, page_size] or [h_kv, num_scales, page_size]."""
    page, head, slot = where
    place = () if part.scale is None else (part.scale,)
    return plt.load(pool.at(page, head, *place, _run(slot, plan.tile))).astype(dtype)


def load_tiles(
    pool: PoolRef, part: Part, where: tuple, axis: int, shifts: dict, plan: TilePlan, *, again: bool = False
) -> list[jax.Array]:
    """int8 tiles of a part, [tile, width] with axis 1 (keys) or [width, tile] with axis 0 (values).

    A tile may enter one product only: for some layouts of operands, a second product is compiled wrongly. The second
    product takes the tile looked up `again`, by code that is different to the compiler.

    Args:
        pool: uint8, pages of [h_kv, page_size, bytes] with axis 1, [h_kv, bytes, page_size] with axis 0.
        part: The part.
        where: Page, KV head and place of the tokens.
        axis: Axis of channels.
        shifts: See `load_shifts`.
        plan: Static configuration.
        again: Whether the same tiles have been loaded before.
    """
    out = []
    for tile, fields in zip(part.tiles, load_fields(pool, part, where, axis, shifts, plan), strict=True):
        if part.unsigned:
            out.append(integer_tile(fields[0], interpret=plan.interpret, again=again))
        else:
            mixed = None if tile.partner is None else tile.half
            out.append(codebook_tile(fields, part.book, interpret=plan.interpret, mixed=mixed, again=again))
    return out


def load_fields(pool: PoolRef, part: Part, where: tuple, axis: int, shifts: dict, plan: TilePlan) -> list[list[Field]]:
    """The planes of every tile of a part; arguments as for `load_tiles`."""
    loaded: dict[tuple, tuple[jax.Array, jax.Array | None]] = {}
    out = []
    for tile in part.tiles:
        fields = []
        for width, start, size, field in planes_of(part, tile):
            # Tiles of other fields of the same bytes, mixed ones included, share one load.
            key = (start, tile.start % size, tile.width, tile.valid)
            if key not in loaded:
                loaded[key] = _load_bytes(pool, where, part, (width, start, size), tile, axis, shifts, plan)
            last = (tile.start % size + tile.width - 1) // size
            fields.append(Field(loaded[key][0], width, field, loaded[key][1], last))
        out.append(fields)
    return out


def _load_bytes(
    pool: PoolRef,
    where: tuple,
    part: Part,
    plane: tuple[int, int, int],
    tile: Tile,
    axis: int,
    shifts: dict,
    plan: TilePlan,
) -> tuple[jax.Array, jax.Array | None]:
    """Bytes of one plane for a tile and, if the tile covers several fields, how many fields to shift each element.

    Both have the tile's shape. `plane` is the width of a field, the first byte and the number of bytes.
    """
    width, start, size = plane
    first = tile.start % size
    several = first + tile.valid > size
    whole = tile.valid == tile.width
    shape = (plan.tile, tile.width) if axis else (tile.width, plan.tile)
    # Bytes are repeated by views alone, so that the operand of the product is still a load.
    repeated = several and whole and first == 0 and tile.width % size == 0 and _is_power(size)
    if repeated or (whole and not several):
        count = size if repeated else tile.width
        run = jnp.expand_dims(_run(start + first, count), 1 - axis)  # [1, count] or [count, 1]
        data = plt.load(_bytes_at(pool, where, run, axis, plan))  # [tile, count] or [count, tile]
        if repeated:
            views = (plan.tile, tile.width // size, size) if axis else (tile.width // size, size, plan.tile)
            data = jnp.broadcast_to(jnp.expand_dims(data, axis), views).reshape(shape)
    else:
        channel = lax.broadcasted_iota(jnp.int32, shape, axis)  # the tile's shape, as all below
        byte = start + lax.rem(first + channel, jnp.full_like(channel, size))
        at = _bytes_at(pool, where, byte, axis, plan)
        data = plt.load(at) if whole else plt.load(at, mask=channel < tile.valid, other=jnp.uint8(0))
    if not several:
        return data, None
    shift = jnp.broadcast_to(jnp.expand_dims(shifts[first, size, tile.width], 1 - axis), shape)
    if axis and not part.words:
        # Four neighbours may be of different fields: shift each by itself.
        return data >> (lax.bitcast_convert_type(shift, jnp.uint8) * width), None
    return data, shift


def _bytes_at(pool: PoolRef, where: tuple, byte: jax.Array, axis: int, plan: TilePlan) -> Any:
    """Reference to bytes of a tile's tokens.

    Args:
        pool: As for `load_tiles`.
        where: As for `load_tiles`.
        byte: Numbers of bytes of a token, in the tile's shape, or with 1 in place of its tokens.
        axis: Axis of channels.
        plan: Static configuration.
    """
    page, head, slot = where
    token = jnp.expand_dims(_run(slot, plan.tile), axis)  # [tile, 1] or [1, tile]
    page = jnp.expand_dims(page, axis) if page.ndim else page
    return pool.at(page, head, token, byte) if axis else pool.at(page, head, byte, token)


def _run(start: Any, count: int) -> jax.Array:
    """Successive numbers [count] from a first one on; numbers that are [count] already stay as they are."""
    return start if jnp.ndim(start) else start + lax.broadcasted_iota(jnp.int32, (count,), 0)


def _is_power(n: int) -> bool:
    return n & (n - 1) == 0


def shift_table(plan: TilePlan) -> np.ndarray | None:
    """The array that `load_shifts` reads: the shifts of all tiles, one after the other; None if no tile needs shifts.

    Shifts are loaded, not computed: Triton moves the layout of a product's operands up through arithmetic to loads, but
    not to numbers that the kernel makes, and would send the whole tile through shared memory instead.

    Args:
        plan: Static configuration.

    Returns:
        int8 [sum of the widths of the tiles that need shifts].
    """
    runs = [(first + np.arange(width)) // size for first, size, width in _shift_keys(plan)]
    return np.concatenate(runs).astype(np.int8) if runs else None


def load_shifts(x: Any, plan: TilePlan) -> dict[tuple[int, int, int], jax.Array]:
    """For tiles that cover several fields, by `_shift_keys`: how many fields to add for each channel, int8 [width]."""
    shifts, start = {}, 0
    for key in _shift_keys(plan):
        shifts[key] = x.shifts[pl.ds(start, key[2])]
        start += key[2]
    return shifts


def _shift_keys(plan: TilePlan) -> list[tuple[int, int, int]]:
    """First channel in its plane, bytes of the plane and width of each kind of tile that covers several fields."""
    keys = {}
    for part in plan.keys + plan.values:
        for tile in part.tiles:
            for _, _, size, _ in planes_of(part, tile):
                first = tile.start % size
                if first + tile.valid > size:
                    keys[first, size, tile.width] = None
    return list(keys)
