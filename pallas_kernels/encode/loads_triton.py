"""Tiles of tokens of one head: where they are, loading them, writing what they become into pages."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.encode.plan import Inputs, Plan


@dataclasses.dataclass(frozen=True)
class Place:
    """Row and token of each vector of a tile in the batch, page and slot in the pools; [tile] but for a common row.

    `statistics` is the row of mean and weight.
    """

    row: jax.Array
    statistics: jax.Array
    token: jax.Array
    head: jax.Array
    page: jax.Array
    slot: jax.Array
    valid: jax.Array


def find_place(x: Inputs, pool: Any, plan: Plan, head: jax.Array, block: jax.Array, row: jax.Array) -> Place:
    """The place of a program's tile; its row is no program's where tiles hold tokens of several."""
    index = block * plan.tile + lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)
    if plan.flat:
        count = jnp.full_like(index, plan.tokens)
        row, token, exists = lax.div(index, count), lax.rem(index, count), index < plan.rows * plan.tokens
    else:
        row, token, exists = jnp.full((1,), row, jnp.int32), index, index < plan.tokens
    slot = plt.load(x.slots.at[jnp.broadcast_to(row, token.shape), token], mask=exists, other=-1)
    room = pool.scale.shape[0] * plan.page_size
    valid = (slot >= 0) & (slot < room)
    # Interpreted stores write back what they found where they are masked; behind the pool that harms nobody.
    slot = jnp.where(valid, slot, room)
    size = jnp.full_like(slot, plan.page_size)
    statistics = row
    if x.rows is not None:
        # Of rows that there are not no token has a slot.
        statistics = jnp.clip(plt.load(x.rows.at[row], mask=row < plan.rows, other=0), 0, x.mean.shape[0] - 1)
    return Place(row, statistics, token, head, lax.div(slot, size), lax.rem(slot, size), valid)


def load(x: Inputs, at: Place, start: int, width: int, plan: Plan) -> jax.Array:
    """Channels start to start + width, centred and weighted; zero where they or the token do not exist."""
    dim, shape = x.x.shape[3], (plan.tile, width)
    channel = start + lax.broadcasted_iota(jnp.int32, (1, width), 1)
    index = jnp.broadcast_to(at.row[:, None], shape), at.token[:, None], at.head, channel
    mask = jnp.broadcast_to(at.valid[:, None], shape)
    padded = start + width > dim
    if padded:
        mask = mask & (channel < dim)
    out = plt.load(x.x.at[tuple(jnp.broadcast_to(i, shape) for i in index)], mask=mask, other=0)
    if not plan.planes:
        return out
    out = out.astype(jnp.float32)
    if x.mean is None:
        return out

    def statistic(ref: Any) -> jax.Array:
        common = (at.row.shape[0], width)
        place = tuple(jnp.broadcast_to(i, common) for i in (at.statistics[:, None], at.head, channel))
        if plan.flat:
            return plt.load(ref.at[place], mask=mask, other=0.0)
        return plt.load(ref.at[place], mask=channel < dim, other=0.0) if padded else plt.load(ref.at[place])

    return (out - statistic(x.mean)) * statistic(x.weight)


def store_bytes(ref: Any, data: jax.Array, size: int, byte: int, at: Place, *, channel_major: bool) -> None:
    """Writes bytes byte to byte + size of each vector."""
    place = lax.broadcasted_iota(jnp.int32, (1, data.shape[1]), 1)
    index = at.page[:, None], at.head, at.slot[:, None], byte + place
    mask = jnp.broadcast_to(at.valid[:, None], data.shape)
    if size < data.shape[1]:
        mask = mask & (place < size)
    index = [jnp.broadcast_to(i, data.shape) for i in index]
    if channel_major:
        # Neighbouring threads write neighbouring tokens.
        page, head, slot, place = (i.T for i in index)
        plt.store(ref.at[page, head, place, slot], data.T, mask=mask.T)
    else:
        plt.store(ref.at[tuple(index)], data, mask=mask)


def store_scalar(ref: Any, scalar: jax.Array, at: Place, number: int | None) -> None:
    """Writes a scalar a vector, of which there are several unless number is None."""
    head = jnp.broadcast_to(at.head, at.page.shape)
    index = (at.page, head, at.slot) if number is None else (at.page, head, jnp.full_like(at.page, number), at.slot)
    plt.store(ref.at[index], scalar, mask=at.valid)


def mask_channels(tile: jax.Array, dim: int) -> jax.Array:
    """Zero where there is no channel."""
    if tile.shape[1] == dim:
        return tile
    return jnp.where(lax.broadcasted_iota(jnp.int32, tile.shape, 1) < dim, tile, 0.0)


def padded_size(count: int) -> int:
    """The power of two, at least 16, that holds a number of channels or bytes."""
    return max(16, 1 << (count - 1).bit_length())
