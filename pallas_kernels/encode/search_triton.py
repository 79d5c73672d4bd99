"""The search of the step of vectors: the multiple of the step whose levels leave the least squared error.

A program of several tokens tries one multiple of all vectors after the other. A program of one token tries a multiple
in each row of a tile, so that its search has two steps instead of fifteen.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.encode.plan import EncodeInputs, EncodePlan
from pallas_kernels.encode.reference import COARSE, FINE, OWN_STEP
from pallas_kernels.tiles.intrinsics_triton import perform

ROWS = 16
"""Rows of the tile that searches the step of one vector: at least len(COARSE) and len(FINE) + 1."""

PLACES = 64
"""Power of two above every place of a multiple."""


def rows_of_search(plan: EncodePlan) -> int:
    """Rows of the tiles whose multiples are tried at once."""
    return ROWS if plan.tile == 1 else plan.tile


def best_inverse_multiple(
    x: EncodeInputs, sums: Callable[[jax.Array], tuple[jax.Array, jax.Array]], plan: EncodePlan
) -> jax.Array:
    """The best inverse multiple of each vector, [tile]; see `reference.best_inverse_multiple`.

    Args:
        x: The inputs.
        sums: From inverse multiples [rows] to <|s|, q> and <q, q>, [rows] each, of magnitudes s and their levels q;
            `rows_of_search` says how many rows.
        plan: The plan.
    """

    def gain(place: jax.Array) -> jax.Array:
        along, squared = sums(plt.load(x.inverse.at[place]))
        return along * along * perform("rcp.approx.ftz.f32", squared, interpret=plan.interpret)

    best = _in_rows(gain) if plan.tile == 1 else _in_turn(gain, plan.tile)
    return plt.load(x.inverse.at[best])


def _in_turn(gain: Callable[[jax.Array], jax.Array], tile: int) -> jax.Array:
    """Tries one multiple of several vectors after the other.

    Args:
        gain: From places of multiples [tile] to their gains [tile].
        tile: Number of vectors.

    Returns:
        Places of the best multiples, [tile].
    """

    def consider(best: tuple[jax.Array, ...], place: jax.Array) -> tuple[jax.Array, ...]:
        new = gain(place), place
        better = new[0] > best[0]
        return tuple(jnp.where(better, a, b) for a, b in zip(new, best, strict=True))

    def coarse(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return consider(best, jnp.full((tile,), i * COARSE[1], jnp.int32))

    def fine(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return consider(best, _near(best_coarse[1], i))

    start = jnp.full((tile,), -1.0, jnp.float32), jnp.full((tile,), OWN_STEP, jnp.int32)
    best_coarse = lax.fori_loop(0, len(COARSE), coarse, start)
    return lax.fori_loop(0, len(FINE), fine, best_coarse)[1]


def _in_rows(gain: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Tries multiples of one vector, each in a row of a tile.

    Args:
        gain: From places of multiples [ROWS] to their gains [ROWS].

    Returns:
        Place of the best multiple, [1].
    """
    row = lax.broadcasted_iota(jnp.int32, (ROWS,), 0)

    def first_best(place: jax.Array) -> jax.Array:
        gains = gain(place)
        best = gains == jnp.max(gains, axis=0)  # nowhere if gains are NaN
        # The place is in the low bits: of rows with equal gains the first one counts, as it does in turn.
        return jnp.min(jnp.where(best, row * PLACES + place, ROWS * PLACES + OWN_STEP), axis=0) % PLACES

    coarse = first_best(jnp.minimum(row, len(COARSE) - 1) * COARSE[1])
    near = _near(coarse, jnp.minimum(row, len(FINE)) - 1)
    return jnp.broadcast_to(first_best(jnp.where(row == 0, coarse, near)), (1,))


def _near(place: jax.Array, i: jax.Array) -> jax.Array:
    """Places of the multiple number i that a search tries near the best one of COARSE.

    Args:
        place: Places of the best multiples.
        i: Index in FINE.
    """
    offset = i - len(FINE) // 2
    return jnp.clip(place + offset + (offset >= 0).astype(jnp.int32), 0, COARSE[-1])
