"""Tiles of tokens of one head: where they are, how they are loaded, how their codes are written into pages."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.encode.plan import EncodeInputs, EncodePlan
from pallas_kernels.numerics import power_of_two
from pallas_kernels.tiles.pool_ref import PoolRef


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the vectors of a tile are in the batch, and where their codes go in the pools.

    Attributes:
        row: int32 [tile], row of the batch; [1] if all tokens are of one row.
        statistics: Row of mean and weight; shaped like `row`.
        token: int32 [tile], token of the row.
        head: int32 scalar.
        page: int32 [tile].
        slot: int32 [tile], place in the page.
        valid: bool [tile], whether the token exists and has a slot in the pool.
    """

    row: jax.Array
    statistics: jax.Array
    token: jax.Array
    head: jax.Array
    page: jax.Array
    slot: jax.Array
    valid: jax.Array


def find_place(
    x: EncodeInputs, pool: Any, plan: EncodePlan, head: jax.Array, block: jax.Array, row: jax.Array
) -> Place:
    """The place of a program's tile.

    Args:
        x: The inputs.
        pool: The pool.
        plan: The plan.
        head: Head of the program.
        block: Number of the tile.
        row: Row of the program; not read if tiles hold tokens of several rows.
    """
    index = block * plan.tile + lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)
    if plan.flat:
        count = jnp.full_like(index, plan.tokens)
        row, token, exists = lax.div(index, count), lax.rem(index, count), index < plan.rows * plan.tokens
    else:
        row, token, exists = jnp.full((1,), row, jnp.int32), index, index < plan.tokens
    # From here on all are [tile].
    slot = plt.load(x.slots.at[jnp.broadcast_to(row, token.shape), token], mask=exists, other=-1)
    room = pool.scale.pages * plan.page_size
    valid = (slot >= 0) & (slot < room)
    # Interpreted stores write back the old values where they are masked; behind the pool they do no harm.
    slot = jnp.where(valid, slot, room)
    size = jnp.full_like(slot, plan.page_size)
    statistics = row
    if x.rows is not None:
        # A row outside the cache has no valid slot, so its statistics may be those of any row.
        statistics = jnp.clip(plt.load(x.rows.at[row], mask=row < plan.rows, other=0), 0, x.mean.shape[0] - 1)
    return Place(row, statistics, token, head, lax.div(slot, size), lax.rem(slot, size), valid)


def load(x: EncodeInputs, at: Place, start: int, width: int, plan: EncodePlan) -> jax.Array:
    """Channels start to start + width, centred and weighted; zero where a channel or a token does not exist.

    Returns:
        [tile, width], of the inputs' type if plan.planes is 0, else float32.
    """
    channel = start + lax.broadcasted_iota(jnp.int32, (1, width), 1)
    return load_channels(x, at, channel, plan, padded=start + width > x.x.shape[3])


def load_channels(x: EncodeInputs, at: Place, channel: jax.Array, plan: EncodePlan, *, padded: bool) -> jax.Array:
    """The given channels, centred and weighted; zero where a channel or a token does not exist.

    Args:
        x: The inputs.
        at: Place of each vector.
        channel: int32 [1, width]; [any, width] if the program has one token.
        plan: The plan.
        padded: Whether some channels do not exist.

    Returns:
        [tile, width], or shaped like the channels; of the inputs' type if plan.planes is 0, else float32.
    """
    dim, shape = x.x.shape[3], jnp.broadcast_shapes((plan.tile, 1), channel.shape)
    index = jnp.broadcast_to(at.row[:, None], shape), at.token[:, None], at.head, channel
    mask = jnp.broadcast_to(at.valid[:, None], shape)
    if padded:
        mask = mask & (channel < dim)
    out = plt.load(x.x.at[tuple(jnp.broadcast_to(i, shape) for i in index)], mask=mask, other=0)
    if not plan.planes:
        return out
    out = out.astype(jnp.float32)
    if x.mean is None:
        return out

    def statistic(ref: Any) -> jax.Array:
        """Shaped like the result, or [1, width] for a common row, of a reference [statistics rows, heads, dim]."""
        common = jnp.broadcast_shapes((at.row.shape[0], 1), channel.shape)
        place = tuple(jnp.broadcast_to(i, common) for i in (at.statistics[:, None], at.head, channel))
        if plan.flat:
            return plt.load(ref.at[place], mask=mask, other=0.0)
        return plt.load(ref.at[place], mask=channel < dim, other=0.0) if padded else plt.load(ref.at[place])

    return (out - statistic(x.mean)) * statistic(x.weight)


def copy_tokens(x: EncodeInputs, exact: Any, at: Place, plan: EncodePlan) -> None:
    """Copies the vectors of a tile as they are to their places among the tokens in full precision.

    Args:
        x: The inputs, with places.
        exact: Reference [n, heads, dim].
        at: Place of each vector.
        plan: The plan.
    """
    dim = x.x.shape[3]
    shape = (plan.tile, power_of_two(dim))
    row = jnp.broadcast_to(at.row, at.token.shape)
    place = plt.load(x.places.at[row, at.token, jnp.zeros_like(row)], mask=at.valid, other=-1)  # [tile]
    # Behind the pool, interpreted stores of masked elements do no harm.
    place = jnp.where(place >= 0, place, exact.shape[0])
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = (place < exact.shape[0])[:, None] & (channel < dim)
    index = (jnp.broadcast_to(i, shape) for i in (row[:, None], at.token[:, None], at.head))
    vectors = plt.load(x.x.at[(*index, channel)], mask=mask, other=0)
    plt.store(
        exact.at[jnp.broadcast_to(place[:, None], shape), jnp.broadcast_to(at.head, shape), channel], vectors, mask=mask
    )


def store_bytes(pool: PoolRef, data: jax.Array, size: int, byte: int, at: Place, *, channel_major: bool) -> None:
    """Writes bytes byte to byte + size of each vector.

    Args:
        pool: Bytes: pages of [heads, page_size, bytes], or of [heads, bytes, page_size] if channel-major.
        data: uint8 [tile, at least size].
        size: Bytes to write.
        byte: The first of them.
        at: Place of each vector.
        channel_major: Whether bytes come before tokens.
    """
    place = lax.broadcasted_iota(jnp.int32, (1, data.shape[1]), 1)
    page, slot, byte_number = at.page[:, None], at.slot[:, None], byte + place
    mask = jnp.broadcast_to(at.valid[:, None], data.shape)
    if size < data.shape[1]:
        mask = mask & (place < size)
    if channel_major:
        # Neighbouring threads write neighbouring tokens.
        pool.store(data.T, mask.T, page.T, at.head, byte_number.T, slot.T)
    else:
        pool.store(data, mask, page, at.head, slot, byte_number)


def store_scalar(pool: PoolRef, scalar: jax.Array, at: Place, number: int | None) -> None:
    """Writes one scalar per vector.

    Args:
        pool: Scalars: pages of [heads, page_size], or of [heads, scalars, page_size].
        scalar: [tile].
        at: Place of each vector.
        number: Which of a vector's scalars this is; None if vectors have one.
    """
    place = () if number is None else (number,)
    pool.store(scalar, at.valid, at.page, at.head, *place, at.slot)


def mask_channels(tile: jax.Array, dim: int) -> jax.Array:
    """A tile [tile, padded dim] with zeros from channel dim on."""
    if tile.shape[1] == dim:
        return tile
    return jnp.where(lax.broadcasted_iota(jnp.int32, tile.shape, 1) < dim, tile, 0.0)


def padded_size(count: int) -> int:
    """The power of two, at least 16, that holds a number of channels or bytes."""
    return max(16, power_of_two(count))
