"""Loads of the kernels over pages: pages of tokens to scales and planes of codes, or int8 tiles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.tiles.int8_triton import Field, codebook_tile, integer_tile
from pallas_kernels.tiles.layout import Part, Tile, planes_of

Plan = Any
"""A `decode.plan.Plan`, or another with its keys, values, tile, page_size and interpret."""


def page_of(x: Any, row: jax.Array, index: jax.Array, plan: Plan) -> jax.Array:
    """Page of a tile or, where pages are smaller, of each of its tokens [tile].

    Quotients and remainders are those of C, whose divisibility Triton understands.
    """
    last = x.table.shape[1] - 1
    if plan.tile <= plan.page_size:
        return x.table[row, jnp.minimum(lax.div(index, jnp.int32(plan.page_size // plan.tile)), last)]
    token = lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)
    place = index * (plan.tile // plan.page_size) + lax.div(token, jnp.full_like(token, plan.page_size))
    return plt.load(x.table.at[jnp.full_like(token, row), jnp.minimum(place, last)])


def slot_of(index: jax.Array, plan: Plan) -> jax.Array:
    """Place in its page of a tile's first token or, where pages are smaller, of each of its tokens [tile]."""
    if plan.tile <= plan.page_size:
        return lax.rem(index, jnp.int32(plan.page_size // plan.tile)) * plan.tile
    token = lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)
    return lax.rem(token, jnp.full_like(token, plan.page_size))


def load_scale(ref: Any, part: Part, where: tuple, plan: Plan, *, dtype: Any = jnp.float32) -> jax.Array:
    """Scales [tile] of a part."""
    page, head, slot = where
    place = () if part.scale is None else (part.scale,)
    if not page.ndim:
        return ref[(page, head, *place, pl.ds(slot, plan.tile))].astype(dtype)
    others = [jnp.full_like(page, i) for i in (head, *place)]
    return plt.load(ref.at[(page, *others, slot)]).astype(dtype)


def load_tiles(
    ref: Any, part: Part, where: tuple, axis: int, shifts: dict, plan: Plan, *, again: bool = False
) -> list[jax.Array]:
    """int8 tiles of a part, [tile, width] with axis 1 (keys) or [width, tile] with axis 0 (values).

    A tile may enter one product only: of two, the compiled kernel gets the second wrong for some layouts of operands.
    A second product takes the tile looked up `again`, which is different code to the compiler.
    """
    out = []
    for tile, fields in zip(part.tiles, load_fields(ref, part, where, axis, shifts, plan), strict=True):
        if part.unsigned:
            out.append(integer_tile(fields[0], interpret=plan.interpret, again=again))
        else:
            mixed = None if tile.partner is None else tile.half
            out.append(codebook_tile(fields, part.book, interpret=plan.interpret, mixed=mixed, again=again))
    return out


def load_fields(ref: Any, part: Part, where: tuple, axis: int, shifts: dict, plan: Plan) -> list[list[Field]]:
    """The planes of every tile of a part."""
    loaded: dict[tuple, tuple[jax.Array, jax.Array | None]] = {}
    out = []
    for tile in part.tiles:
        fields = []
        for width, start, size, field in planes_of(part, tile):
            # Tiles of other fields of the same bytes, mixed ones included, share them.
            key = (start, tile.start % size, tile.width, tile.valid)
            if key not in loaded:
                loaded[key] = _load_bytes(ref, where, part, (width, start, size), tile, axis, shifts, plan)
            last = (tile.start % size + tile.width - 1) // size
            fields.append(Field(loaded[key][0], width, field, loaded[key][1], last))
        out.append(fields)
    return out


def _load_bytes(
    ref: Any, where: tuple, part: Part, plane: tuple[int, int, int], tile: Tile, axis: int, shifts: dict, plan: Plan
) -> tuple[jax.Array, jax.Array | None]:
    """Bytes of one plane for a tile, and the shift in fields where the tile covers several."""
    width, start, size = plane
    first = tile.start % size
    several = first + tile.valid > size
    whole = tile.valid == tile.width
    shape = (plan.tile, tile.width) if axis else (tile.width, plan.tile)
    # Repeated bytes are repeated by views alone, which leaves the operand of the product a load.
    repeated = several and whole and first == 0 and tile.width % size == 0 and _is_power(size)
    if repeated or (whole and not several):
        count = size if repeated else tile.width
        data = _load_run(ref, where, start + first, count, axis, plan)
        if repeated:
            views = (plan.tile, tile.width // size, size) if axis else (tile.width // size, size, plan.tile)
            data = jnp.broadcast_to(jnp.expand_dims(data, axis), views).reshape(shape)
    else:
        channel = lax.broadcasted_iota(jnp.int32, shape, axis)
        byte = start + lax.rem(first + channel, jnp.full_like(channel, size))
        at = ref.at[_byte_index(where, byte, axis, plan)]
        data = plt.load(at) if whole else plt.load(at, mask=channel < tile.valid, other=jnp.uint8(0))
    if not several:
        return data, None
    shift = jnp.broadcast_to(jnp.expand_dims(shifts[first, size, tile.width], 1 - axis), shape)
    if axis and not part.words:
        # Four neighbours do not share their field: shift each by itself.
        return data >> (lax.bitcast_convert_type(shift, jnp.uint8) * width), None
    return data, shift


def _load_run(ref: Any, where: tuple, start: int, count: int, axis: int, plan: Plan) -> jax.Array:
    """Bytes start to start + count of the tokens of a tile, along an axis."""
    page, head, slot = where
    if not page.ndim:
        token, byte = pl.ds(slot, plan.tile), pl.ds(start, count)
        return ref[(page, head, token, byte) if axis else (page, head, byte, token)]
    shape = (plan.tile, count) if axis else (count, plan.tile)
    return plt.load(ref.at[_byte_index(where, start + lax.broadcasted_iota(jnp.int32, shape, axis), axis, plan)])


def _byte_index(where: tuple, byte: jax.Array, axis: int, plan: Plan) -> tuple[jax.Array, ...]:
    """Index of bytes given as an array of the tile's shape."""
    page, head, slot = where
    if page.ndim:
        page, slot = jnp.expand_dims(page, axis), jnp.expand_dims(slot, axis)
        token = jnp.broadcast_to(slot, byte.shape)
    else:
        token = slot + lax.broadcasted_iota(jnp.int32, byte.shape, 1 - axis)
    page, head = jnp.broadcast_to(page, byte.shape), jnp.broadcast_to(head, byte.shape)
    return (page, head, token, byte) if axis else (page, head, byte, token)


def _is_power(n: int) -> bool:
    return n & (n - 1) == 0


def shift_table(plan: Plan) -> np.ndarray | None:
    """What `load_shifts` reads: the shifts of all tiles, one after the other; None if no tile has any.

    They come from memory: Triton moves the layout of a product's operands up through arithmetic to loads, but not to
    numbers that are made on the spot, and would send the whole tile through shared memory instead.
    """
    runs = [(first + np.arange(width)) // size for first, size, width in _shift_keys(plan)]
    return np.concatenate(runs).astype(np.int8) if runs else None


def load_shifts(x: Any, plan: Plan) -> dict[tuple[int, int, int], jax.Array]:
    """For tiles that cover several fields: how many fields to add for each channel, int8 [width]."""
    shifts, start = {}, 0
    for key in _shift_keys(plan):
        shifts[key] = x.shifts[pl.ds(start, key[2])]
        start += key[2]
    return shifts


def _shift_keys(plan: Plan) -> list[tuple[int, int, int]]:
    """First channel, bytes of the plane and width of the tiles that cover several fields."""
    keys = {}
    for part in plan.keys + plan.values:
        for tile in part.tiles:
            for _, _, size, _ in planes_of(part, tile):
                first = tile.start % size
                if first + tile.valid > size:
                    keys[first, size, tile.width] = None
    return list(keys)
