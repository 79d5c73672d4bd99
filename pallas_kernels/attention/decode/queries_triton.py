"""Queries of the decode kernel as integers of one or two bytes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.decode.plan import DecodeInputs, DecodePlan
from pallas_kernels.numerics import BYTE_BITS, LOG2_E, SIGNED_ANCHOR, SIGNED_ANCHOR_BITS
from pallas_kernels.tiles.int8_triton import mixed_index
from pallas_kernels.tiles.layout import Part

LEAST_QUERY = 1e-30
"""Least magnitude that the largest channel of a query row is taken to have: a query of zeros has a scale, too."""


def logit_unit(plan: DecodePlan) -> float:
    """Factor of queries and biases: log2(e), or 1 / cap with a soft-cap, whose tanh then needs no factor of its own."""
    return LOG2_E if plan.options.softcap is None else 1.0 / plan.options.softcap


def query_index(column: jax.Array, head: jax.Array, plan: DecodePlan) -> tuple[jax.Array, jax.Array]:
    """Query token and query head [columns] of each column; columns behind the last query row repeat it."""
    column = jnp.minimum(column >> 1 if plan.pairs else column, plan.count * plan.group - 1)  # [columns], query rows
    if plan.count == 1:
        return jnp.zeros_like(column), head * plan.group + column
    group = jnp.full_like(column, plan.group)
    return lax.div(column, group), head * plan.group + lax.rem(column, group)


def weight_of_byte(plan: DecodePlan) -> jax.Array:
    """The factor [columns] of the integers of each column of pairs: 256 for high bytes and 1 for low ones."""
    odd = lax.broadcasted_iota(jnp.int32, (plan.columns,), 0) & 1  # [columns]
    return jnp.where(odd == 0, float(1 << BYTE_BITS), 1.0)


@dataclasses.dataclass(frozen=True)
class QuantizedQuery:
    """Quantized query rows for one key part.

    Attributes:
        tiles: Per channel tile the operands int8 [width, columns]: one, or the high and the low byte.
        half: int32 [columns], half the sum of a column's integers, which the halves of half-integers amount to.
        factor: float32 [columns], the factor from integer products to logits times log2(e).
    """

    tiles: list[tuple[jax.Array, ...]]
    half: jax.Array
    factor: jax.Array


def quantized_query(
    x: DecodeInputs, part: Part, row: jax.Array, token: jax.Array, head: jax.Array, plan: DecodePlan
) -> QuantizedQuery:
    """Loads and quantizes the query rows, of which token and head [columns] are given, for a key part."""
    source = x.sketch if part.sketch else x.query  # [b, t, h_q, d]
    tiles, largest = [], jnp.zeros((plan.columns,), jnp.float32)
    for tile in part.tiles:
        # Channels first: they are then contiguous in shared memory, as 8-bit products need the axis that they sum.
        shape = (tile.width, plan.columns)
        channel = lax.broadcasted_iota(jnp.int32, shape, 0)  # [width, columns]
        start: jax.Array | int = tile.start
        if tile.partner is not None:
            partner, channel = mixed_index(channel)
            start, channel = jnp.where(partner, tile.partner, tile.start), channel + 2 * tile.half
        index = [jnp.broadcast_to(i[None, :], shape) for i in (jnp.full_like(token, row), token, head)]
        at = source.at[(*index, part.channel + start + channel)]
        whole = tile.valid == tile.width
        # [width, columns]
        tiles.append(plt.load(at) if whole else plt.load(at, mask=channel < tile.valid, other=0.0))
        largest = jnp.maximum(largest, jnp.max(jnp.abs(tiles[-1]), axis=0))  # [columns]
    largest = jnp.maximum(largest, LEAST_QUERY)
    total = jnp.zeros((plan.columns,), jnp.int32)
    quantized = []
    for q in tiles:
        integer = integers(q * (plan.largest_query / largest)[None, :])  # [width, columns]
        if plan.pairs:
            integer = byte_of_column(integer, plan)
        total = total + jnp.sum(integer, axis=0)  # [columns]
        quantized.append(bytes_of(integer) if plan.precise and not plan.pairs else (integer.astype(jnp.int8),))
    factor = largest * (part.book.step * plan.options.scale * logit_unit(plan) / plan.largest_query)  # [columns]
    if plan.pairs:
        factor = factor * weight_of_byte(plan)
    # An odd sum loses half a step here, which is 1e-5 of a logit.
    return QuantizedQuery(quantized, total // 2, factor)


def integers(x: jax.Array) -> jax.Array:
    """Nearest int32 of floats of magnitudes up to 2**22."""
    return lax.bitcast_convert_type(x + SIGNED_ANCHOR, jnp.int32) - SIGNED_ANCHOR_BITS


def _high_byte(integer: jax.Array) -> jax.Array:
    """The signed high byte of an integer, rounded so that the signed low byte is the rest."""
    return (integer + (1 << (BYTE_BITS - 1))) >> BYTE_BITS


def bytes_of(integer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An integer of magnitude up to LARGEST_TWO_BYTES as signed bytes, the high one first."""
    high = _high_byte(integer)
    return high.astype(jnp.int8), (integer - (high << BYTE_BITS)).astype(jnp.int8)


def byte_of_column(integer: jax.Array, plan: DecodePlan) -> jax.Array:
    """The signed byte of integers [n, columns] that each column of pairs holds: high ones in even columns."""
    high = _high_byte(integer)  # [n, columns]
    odd = (lax.broadcasted_iota(jnp.int32, integer.shape, 1) & 1) == 1  # [n, columns]
    return jnp.where(odd, integer - (high << BYTE_BITS), high)
