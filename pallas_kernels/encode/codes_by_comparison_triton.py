"""Codes of quads of channels by comparison with every threshold: any codebook that quads hold."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.encode.channel_quads_triton import ChannelQuad, scaled
from pallas_kernels.encode.codes_by_comparison_ptx import LARGEST_CELL, codes_ptx, levels_ptx
from pallas_kernels.format import Codebook
from pallas_kernels.tiles.intrinsics_triton import run


def sums(
    parts: Sequence[ChannelQuad], factor: jax.Array, book: Codebook, *, searching: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Sums of `codes`, without the codes."""
    return _encoded(parts, factor, book, searching, codes=False, interpret=interpret)[1:]


def codes(
    parts: Sequence[ChannelQuad], factor: jax.Array, book: Codebook, *, searching: bool, interpret: bool
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Codes of the levels q nearest to s = |y| * factor.

    A magnitude that is exactly a threshold gets the level above it.

    Args:
        parts: Quads of y.
        factor: float32 [tile], steps per unit of y.
        book: The codebook.
        searching: Whether y are steps of which `factor` is an inverse multiple.
        interpret: Whether to compute in jnp.

    Returns:
        int32 [tile, n] per quad, the codes of its four channels, one per byte; <s, q> [tile] (<|y|, q> if searching);
        <q, q> [tile].
    """
    return _encoded(parts, factor, book, searching, codes=True, interpret=interpret)


def _encoded(
    parts: Sequence[ChannelQuad], factor: jax.Array, book: Codebook, searching: bool, *, codes: bool, interpret: bool
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    wide = jnp.broadcast_to(factor[:, None], parts[0][0].shape)  # [tile, n]
    if interpret:
        found = [_interpreted(quad, wide, book, searching) for quad in parts]
    else:
        code = codes_ptx(book, searching=searching, codes=codes)
        found = [run(code, [*quad, wide]) for quad in parts]
    along, squared = (sum((x[i] for x in found[1:]), found[0][i]) for i in (0, 1))  # [tile, n]
    return [x[2] for x in found if codes], jnp.sum(along, axis=1), jnp.sum(squared, axis=1)


def _interpreted(quad: ChannelQuad, factor: jax.Array, book: Codebook, searching: bool) -> tuple[jax.Array, ...]:
    """The results of `codes_ptx` in jnp, [tile, n] each."""
    along, squared, code = jnp.zeros_like(quad[0]), jnp.zeros_like(quad[0]), jnp.zeros(quad[0].shape, jnp.int32)
    for i, y in enumerate(quad):
        near = jnp.abs(y) * factor
        if book.bits == 8:
            index = jnp.floor(jnp.minimum(near, LARGEST_CELL)).astype(jnp.int32)
            level = index.astype(jnp.float32) + 0.5
        else:
            index, level = jnp.zeros(y.shape, jnp.int32), jnp.full(y.shape, book.levels[0] + 0.5, jnp.float32)
            for threshold, gap in zip(book.thresholds, np.diff(book.levels), strict=True):
                passed = near >= threshold
                index = index + passed.astype(jnp.int32)
                level = level + jnp.where(passed, np.float32(gap), np.float32(0))
        index = index ^ jnp.where(y < 0, 255 if book.bits == 8 else 1 << (book.bits - 1), 0)
        along = along + (jnp.abs(y) if searching else near) * level
        squared, code = squared + level * level, code | (index << (8 * i))
    return along, squared, code


def residuals(
    parts: Sequence[ChannelQuad],
    factor: jax.Array,
    codes: Sequence[jax.Array],
    gain: jax.Array,
    book: Codebook,
    *,
    interpret: bool,
) -> list[ChannelQuad]:
    """Vectors y times their factors, less the levels of their codes times their gains.

    Args:
        parts: Quads of y.
        factor: float32 [tile].
        codes: int32 [tile, n] per quad, one code per byte; empty for codebooks of 0 bits.
        gain: float32 [tile].
        book: The codebook.
        interpret: Whether to compute in jnp.
    """
    if not codes:
        return scaled(parts, factor)
    levels = _interpreted_levels if interpret else _compiled_levels
    out = []
    for quad, code in zip(scaled(parts, factor), codes, strict=True):
        out.append([y - level * gain[:, None] for y, level in zip(quad, levels(quad, code, book), strict=True)])
    return out


def _compiled_levels(quad: ChannelQuad, code: jax.Array, book: Codebook) -> list[jax.Array]:
    return run(levels_ptx(book), [*quad, code])


def _interpreted_levels(quad: ChannelQuad, code: jax.Array, book: Codebook) -> list[jax.Array]:
    """The results of `levels_ptx` in jnp, [tile, n] each."""
    out = []
    for i, y in enumerate(quad):
        index, level = (code >> (8 * i)) & (len(book.levels) - 1), jnp.full(y.shape, book.levels[0] + 0.5, jnp.float32)
        for k, gap in enumerate(np.diff(book.levels)):
            level = level + jnp.where(index > k, np.float32(gap), np.float32(0))
        out.append(jnp.where(y < 0, -level, level))
    return out
