"""The kernel: one program turns a run of tiles of one sequence and KV head into dense vectors.

    vectors [tile, d] = coordinates [tile, width] @ rows of the matrix [width, d], summed over the tiles of channels

Coordinates are float16, as in the kernel of prompts: exact centroids times the scale of their token, but for the
rounding of that product. Keys and values are two launches of the same body.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.numerics import power_of_two
from pallas_kernels.pytree import pytree
from pallas_kernels.tiles.float16_triton import UNIT, centroid_tile, min_max_tile
from pallas_kernels.tiles.layout import Part
from pallas_kernels.tiles.loads_triton import load_fields, load_scale, load_shifts, page_of, slot_of
from pallas_kernels.tiles.pool_ref import PoolShape, pool_refs

KEYS, VALUES = 1, 0
"""Axis of channels in the tiles of keys, [tile, width], and of values, [width, tile]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DequantizePlan:
    """Static configuration of the kernel.

    Attributes:
        parts: Parts of the vectors.
        axis: KEYS or VALUES.
        gain: Factor in the matrix.
        coordinates: Coordinates of a code; the rows of a sketch come behind those of the coordinates.
        tile: Tokens per step.
        page_size: Tokens per page.
        splits: Programs that share the tokens of a sequence and KV head.
        interpret: Whether the kernel runs as jnp.
        pools: Where the pages of each array lie.
    """

    parts: tuple[Part, ...]
    axis: int
    gain: float
    coordinates: int
    tile: int
    page_size: int
    splits: int
    interpret: bool
    pools: tuple[PoolShape, ...]

    @property
    def keys(self) -> tuple[Part, ...]:
        """Parts of keys, for loads."""
        return self.parts if self.axis == KEYS else ()

    @property
    def values(self) -> tuple[Part, ...]:
        """Parts of values, for loads."""
        return self.parts if self.axis == VALUES else ()


@pytree
class DequantizeInputs:
    """Arrays of the kernel, or its references; see `DequantizeArguments`.

    Attributes:
        code: Pools of keys or of values, as `tiles.pool_ref.addressed` makes them.
        matrix: float16 [coordinates, d].
        table: int32 [b, n], page of each run of page_size tokens.
        lengths: int32 [b], tokens of each sequence.
        starts: int32 [b], place of the first token of each sequence in the result.
        heads: int32 [h], KV heads that are wanted.
        mean: float32 [b, h_kv, d], added; None for zero.
        weight: float32 [b, h_kv, d], by which vectors are divided; None for one.
        shifts: int8, see `shift_table`; None where no tile needs shifts.
    """

    code: Any
    matrix: Any
    table: Any
    lengths: Any
    starts: Any
    heads: Any
    mean: Any = None
    weight: Any = None
    shifts: Any = None


def dequantize(x: DequantizeInputs, out_ref: Any, *, plan: DequantizePlan) -> None:
    """The kernel body; program (split, place of the KV head, sequence) writes its share of the tokens.

    Args:
        x: References.
        out_ref: [tokens, h, d]; places of no token are left as they are.
        plan: Static configuration.
    """
    x = dataclasses.replace(x, code=pool_refs(x.code, plan.pools, interpret=plan.interpret))
    split, place, row = (pl.program_id(axis) for axis in range(3))
    head, length = x.heads[place], x.lengths[row]
    tiles = lax.div(length + (plan.tile - 1), jnp.int32(plan.tile))
    share = lax.div(tiles + (plan.splits - 1), jnp.int32(plan.splits))
    begin = jnp.minimum(split * share, tiles)
    shifts = load_shifts(x, plan)
    dim = out_ref.shape[2]
    shape = (plan.tile, power_of_two(dim))
    matrix = [_matrix_rows(x.matrix, part, plan, shape[1]) for part in plan.parts]
    channel = lax.broadcasted_iota(jnp.int32, (shape[1],), 0)  # [d padded]

    def of_channels(ref: Any) -> jax.Array:
        """float32 [d padded] of the sequence and KV head."""
        at = (jnp.full_like(channel, i) for i in (row, head))
        return plt.load(ref.at[(*at, channel)], mask=channel < dim, other=1.0)

    mean, inverse = None, None
    if x.mean is not None:
        mean, inverse = of_channels(x.mean), 1.0 / of_channels(x.weight)

    def step(index: jax.Array, state: jax.Array) -> jax.Array:
        where = (page_of(x, row, index, plan), head, slot_of(index, plan))
        vectors = _vectors(x.code, matrix, where, shifts, shape, plan)
        if mean is not None and inverse is not None:
            vectors = vectors * inverse[None, :] + mean[None, :]
        token = index * plan.tile + lax.broadcasted_iota(jnp.int32, shape, 0)
        at = x.starts[row] + token, jnp.full(shape, place), jnp.broadcast_to(channel[None, :], shape)
        mask = (token < length) & (at[2] < dim)
        plt.store(out_ref.at[at], vectors.astype(out_ref.dtype), mask=mask)
        return state

    lax.fori_loop(begin, jnp.minimum(begin + share, tiles), step, jnp.int32(0))


def _vectors(
    code: Any, matrix: list[list[jax.Array]], where: tuple, shifts: dict, shape: tuple[int, int], plan: DequantizePlan
) -> jax.Array:
    """float32 [tile, d padded]: the tokens of a tile in the original basis."""
    total = None
    contracted = (((plan.axis,), (0,)), ((), ()))
    for part, rows in zip(plan.parts, matrix, strict=True):
        mixed = jnp.zeros(shape, jnp.float32)
        for coordinates, own in zip(_coordinates(code, part, where, shifts, plan), rows, strict=True):
            mixed = mixed + lax.dot_general(coordinates, own, contracted, preferred_element_type=jnp.float32)
        mixed = mixed * ((1.0 if part.unsigned else part.book.step * UNIT) / plan.gain)
        total = mixed if total is None else total + mixed
    assert total is not None
    return total


def _coordinates(code: Any, part: Part, where: tuple, shifts: dict, plan: DequantizePlan) -> list[jax.Array]:
    """float16 tiles of a part, [tile, width] for keys and [width, tile] for values, codebooks' without UNIT * step."""
    packed = code.signs if part.sketch else code.packed

    def scalars(pool: Any) -> jax.Array:
        """float16 scalars of the tokens, to be broadcast along the channels."""
        return jnp.expand_dims(load_scale(pool, part, where, plan, dtype=jnp.float16), plan.axis)

    scale = scalars(code.residual if part.sketch else code.scale)
    if part.unsigned:
        convert = functools.partial(min_max_tile, scale=scale, zero=scalars(code.zero), interpret=plan.interpret)
    else:
        convert = functools.partial(centroid_tile, book=part.book, scale=scale, interpret=plan.interpret)
    return [convert(fields) for fields in load_fields(packed, part, where, plan.axis, shifts, plan)]


def _matrix_rows(matrix: Any, part: Part, plan: DequantizePlan, columns: int) -> list[jax.Array]:
    """Rows of the matrix for the tiles of a part, float16 [width, columns] each, zero where there are none."""
    first, found = plan.coordinates if part.sketch else part.channel, []
    for tile in part.tiles:
        shape = (tile.width, columns)
        row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        at = matrix.at[first + tile.start + row, column]
        if tile.valid == tile.width and matrix.shape[1] == columns:
            found.append(plt.load(at))
        else:
            found.append(plt.load(at, mask=(row < tile.valid) & (column < matrix.shape[1]), other=0.0))
    return found
