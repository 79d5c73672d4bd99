"""Codes of quads of channels by tables of levels, for codebooks that the tables take; without a twin in jnp."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.encode.channel_quads_triton import ChannelQuad
from pallas_kernels.encode.codes_by_table_ptx import CELLS, SMALL, codes_ptx, cut_ptx, sums_ptx
from pallas_kernels.format import Codebook
from pallas_kernels.tiles.intrinsics_triton import run

ChannelBytes = Sequence[jax.Array]
"""The three bytes, lowest first, of each magnitude of a quad: int32 [tile, n] each, one channel per byte."""


def cut(quad: ChannelQuad, book: Codebook) -> ChannelBytes:
    """The bytes of the magnitudes of a quad of steps times SMALL."""
    return run(cut_ptx(book), quad)


def sums(
    parts: Sequence[ChannelQuad],
    magnitudes: Sequence[ChannelBytes],
    factor: jax.Array,
    words: Sequence[jax.Array],
    book: Codebook,
) -> tuple[jax.Array, jax.Array]:
    """Sums over the levels q nearest to s * factor: <s, q> and <q, q>, each up to a constant factor.

    Args:
        parts: Quads of steps s times SMALL.
        magnitudes: Result of `cut` for each quad.
        factor: float32 [tile], inverse multiples of the step.
        words: The words of `codes_by_table_ptx.tables`, int32 [tile] each.
        book: The codebook.

    Returns:
        float32 [tile] each.
    """
    carry_and_odd = words[:4]
    wide = _spread([factor * (CELLS / SMALL), *carry_and_odd], parts[0][0].shape)
    arguments = [*wide, *(x for quad, cut in zip(parts, magnitudes, strict=True) for x in (*quad, *cut))]
    out = run(sums_ptx(book, len(parts)), arguments)  # [tile, n] each
    low, upper, squared = (jnp.sum(x, axis=1).astype(jnp.float32) for x in out)
    return upper * 256.0 + low, squared


def codes(
    parts: Sequence[ChannelQuad], factor: jax.Array, words: Sequence[jax.Array], book: Codebook
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Codes of the levels q nearest to s = |y| * factor / SMALL.

    A magnitude that is exactly a threshold gets the level above it.

    Args:
        parts: Quads of y in any unit.
        factor: float32 [tile], SMALL times the steps per unit of y.
        words: The words of `codes_by_table_ptx.tables`, int32 [tile] each.
        book: The codebook.

    Returns:
        int32 [tile, n] per quad, the codes of its four channels, one per byte; <|y|, q> [tile]; <q, q> [tile].
    """
    wide, code = _spread([factor, *words], parts[0][0].shape), codes_ptx(book)
    found = [run(code, [*quad, *wide]) for quad in parts]
    along, squared = (jnp.sum(sum((x[i] for x in found[1:]), found[0][i]), axis=1) for i in (0, 1))
    return [x[2] for x in found], along, squared.astype(jnp.float32) * 0.25


def _spread(scalars: Sequence[jax.Array], shape: tuple[int, ...]) -> list[jax.Array]:
    """Scalars of each vector [tile] as tiles [tile, n]."""
    return [jnp.broadcast_to(scalar[:, None], shape) for scalar in scalars]
