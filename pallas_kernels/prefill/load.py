"""Loads of packed bytes inside the prefill kernel: the planes of every tile of channels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode.layout import Part, Tile, planes_of
from pallas_kernels.lookup_triton import Field

Where = tuple[jax.Array, jax.Array, jax.Array]
"""Page, KV head and first slot of a tile of tokens."""


def load_tiles(
    ref: Any, part: Part, where: Where, convert: Callable[[list[Field]], jax.Array], *, axis: int, tokens: int
) -> list[jax.Array]:
    """Converted tiles of a part: [tokens, width] with axis 1 (keys) or [width, tokens] with axis 0 (values).

    Args:
        ref: Pool of packed bytes.
        part: The part.
        where: The tile of tokens.
        convert: Makes a tile of its planes.
        axis: Axis of the channels.
        tokens: Tokens of the tile.
    """
    loaded: dict[tuple[int, int, int, int], tuple[jax.Array, jax.Array | None]] = {}

    def load(tile: Tile) -> list[Field]:
        fields = []
        for width, start, size, field in planes_of(part, tile):
            # Tiles of other fields of the same bytes share them.
            key = (start, tile.start % size, tile.width, tile.valid)
            if key not in loaded:
                loaded[key] = _load_bytes(ref, where, start, size, width, tile, axis, tokens)
            fields.append(Field(loaded[key][0], width, field, loaded[key][1]))
        return fields

    return [convert(load(tile)) for tile in part.tiles]


def load_scalars(ref: Any, part: Part, where: Where, *, tokens: int) -> jax.Array:
    """Scalars [tokens] of a part as float16."""
    page, head, slot = where
    place = () if part.scale is None else (part.scale,)
    return ref[(page, head, *place, pl.ds(slot, tokens))].astype(jnp.float16)


def _load_bytes(
    ref: Any, where: Where, start: int, size: int, width: int, tile: Tile, axis: int, tokens: int
) -> tuple[jax.Array, jax.Array | None]:
    """Bytes of one plane for a tile, and the shift in fields where the tile covers several."""
    page, head, slot = where
    first = tile.start % size
    several = first + tile.valid > size
    if not several and tile.valid == tile.width:
        token, byte = pl.ds(slot, tokens), pl.ds(start + first, tile.width)
        return ref[(page, head, token, byte) if axis else (page, head, byte, token)], None
    shape = (tokens, tile.width) if axis else (tile.width, tokens)
    channel = lax.broadcasted_iota(jnp.int32, shape, axis)
    token = slot + lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
    byte = start + lax.rem(first + channel, jnp.full_like(channel, size))
    pages, heads = jnp.broadcast_to(page, shape), jnp.broadcast_to(head, shape)
    at = ref.at[(pages, heads, token, byte) if axis else (pages, heads, byte, token)]
    data = plt.load(at, mask=channel < tile.valid, other=jnp.uint8(0))
    if not several:
        return data, None
    shift = lax.div(first + channel, jnp.full_like(channel, size)).astype(jnp.int8)
    if axis and size % 4:
        # Four neighbours do not share their field: shift each by itself.
        return data >> (lax.bitcast_convert_type(shift, jnp.uint8) * width), None
    return data, shift
