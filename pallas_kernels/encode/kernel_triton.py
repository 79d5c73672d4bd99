"""The encode kernel: one program encodes a tile of tokens of one head and writes the codes into pages.

    x [tokens, channels] -> centred, weighted -> y = x @ matrix -> codes -> bytes = codes @ packer -> pages

Channel quads pack codes in registers. Elsewhere packing is a matrix product too: a packer has 2**(w * i) where field i
of a byte is the plane of width w of a code, and sums below 2**23 are exact.

Integers live in the low bits of floats: the low bits of UNSIGNED_ANCHOR + n are n, and so are those of HALF_ANCHOR + n
in half precision.

Shapes in comments: [tile] is one number per token of the tile, [tile, dim] the channels of a segment padded to a power
of two, [tile, n] a tile of a channel quad (n is `EncodePlan.width`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.encode import channel_quads_triton as channel_quads
from pallas_kernels.encode import codes_by_comparison_triton as by_comparison
from pallas_kernels.encode import codes_by_table_triton as by_table
from pallas_kernels.encode.channel_quads_triton import ChannelQuad
from pallas_kernels.encode.codes_by_comparison_ptx import LARGEST_CELL
from pallas_kernels.encode.codes_by_table_ptx import SMALL, cell_offset, tables
from pallas_kernels.encode.loads_triton import (
    Place,
    copy_tokens,
    find_place,
    load,
    mask_channels,
    padded_size,
    store_bytes,
    store_scalar,
)
from pallas_kernels.encode.plan import EncodeInputs, EncodePlan
from pallas_kernels.encode.reference import LEAST_GROUP_SCALE, scale_of
from pallas_kernels.encode.rotate_triton import (
    hadamard_tiles,
    hadamard_vector,
    rotated,
    row_scale,
    times_columns,
    vectors,
)
from pallas_kernels.encode.search_triton import best_inverse_multiple, rows_of_search
from pallas_kernels.encode.sketch_triton import store_residual
from pallas_kernels.format import Codebook, CodebookFormat, GroupFormat
from pallas_kernels.numerics import HALF_ANCHOR_BITS, UNSIGNED_ANCHOR, UNSIGNED_ANCHOR_BITS
from pallas_kernels.packing import packed_bytes, plane_widths
from pallas_kernels.tiles.intrinsics_triton import above, floor, perform
from pallas_kernels.tiles.pool_ref import pool_refs


def encode_tiles(x: Sequence[EncodeInputs], _: Any, pools: Sequence[Any], *, plans: Sequence[EncodePlan]) -> None:
    """The kernel body; the pools are updated in place.

    Args:
        x: Arrays of each task.
        _: The pools as inputs, which are the outputs too.
        pools: The pool of each task, references laid out as `pallas_kernels.pages` says, and that of its tokens in full
            precision, [n, heads, dim], or None.
        plans: The plan of each task. If there are several tasks, the last axis of the grid counts them.
    """
    head, block, row = (pl.program_id(axis) for axis in range(3))
    if len(plans) == 1:
        _encode_tile(x[0], pools[0], plans[0], head, block, row)
        return
    for i, task in enumerate(zip(x, pools, plans, strict=True)):
        pl.when(row == i)(functools.partial(_encode_tile, *task, head, block, row))


def _encode_tile(
    x: EncodeInputs, pools: tuple[Any, Any], plan: EncodePlan, head: jax.Array, block: jax.Array, row: jax.Array
) -> None:
    pool, exact = pool_refs(pools[0], plan.pools, interpret=plan.interpret), pools[1]
    at = find_place(x, pool, plan, head, block, row)
    if exact is not None:
        copy_tokens(x, exact, at, plan)
    if isinstance(plan.fmt, GroupFormat):
        _encode_groups(x, pool, at, plan.fmt, plan)
    elif plan.tile == 1:
        # Programs of tokens without a slot end at once.
        pl.when(jnp.sum(at.valid.astype(jnp.int32)) > 0)(functools.partial(_encode_quads, x, pool, at, plan))
    elif plan.width:
        _encode_quads(x, pool, at, plan)
    else:
        _encode_segments(x, pool, at, plan.fmt, plan)


def _encode_segments(x: EncodeInputs, pool: Any, at: Place, fmt: CodebookFormat, plan: EncodePlan) -> None:
    rows, factor = vectors(x, at, plan)  # planes [tile, chunk]; [tile]
    byte, channel = 0, 0
    for i, book in enumerate(fmt.segments):
        y = rotated(x, rows, at, i, channel, plan)  # [tile, dim]
        scale, code, centroid = _quantize(x, y, factor, book, plan)  # [tile], [tile, dim], [tile, dim]
        stored = scale.astype(fmt.scale_dtype)
        store_scalar(pool.scale, stored, at, i if fmt.num_scales > 1 else None)
        residual = None
        if fmt.residual:
            # Before the codes are stored: neither vectors nor centroids are needed afterwards.
            residual = y * factor[:, None]  # [tile, dim]
            if book.bits:
                residual = residual - centroid * stored.astype(jnp.float32)[:, None]
        if book.bits:
            _store_code(pool.packed, code, x.packers[i], book.bits, book.dim, byte, at, plan)
        if residual is not None:
            up, down = row_scale([jnp.max(jnp.abs(residual), axis=1)])  # [tile]
            store_residual(x, pool, [residual * up[:, None]], down, at, fmt, plan)
        byte, channel = byte + packed_bytes(book.dim, book.bits), channel + book.dim


def _quantize(
    x: EncodeInputs, y: jax.Array, factor: jax.Array, book: Codebook, plan: EncodePlan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encodes one segment; see `reference.quantize_segment`.

    Args:
        x: The inputs.
        y: [tile, dim], the rotated vectors over their factors.
        factor: [tile].
        book: Codebook of the segment.
        plan: The plan.

    Returns:
        Scales [tile]; int32 codes [tile, dim]; centroids [tile, dim]. At 0 bits only the scales have a meaning.
    """
    scaled = perform("sqrt.rn.f32", jnp.sum(y * y, axis=1), interpret=plan.interpret)  # [tile]
    norm = scaled * factor
    if book.bits == 0:
        return norm, y, y
    steps = y * _inverse_unit(scaled, book, plan)[:, None]  # [tile, dim]
    magnitude = jnp.abs(steps)
    near = magnitude
    if plan.search and book.bits > 1:

        def sums(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
            _, level = _nearest(magnitude * inverse[:, None], book, plan)
            return jnp.sum(magnitude * level, axis=1), jnp.sum(level * level, axis=1)

        near = magnitude * best_inverse_multiple(x, sums, plan)[:, None]
    bits, level = _nearest(near, book, plan)  # [tile, dim]
    along, squared = jnp.sum(magnitude * level, axis=1), jnp.sum(level * level, axis=1)  # [tile]
    negative = steps < 0
    code = jnp.where(negative, bits ^ 255, bits) if book.bits == 8 else bits >> 8
    if book.bits < 8:
        code = (code & ((1 << (book.bits - 1)) - 1)) | jnp.where(negative, 1 << (book.bits - 1), 0)
    centroid = jnp.where(negative, -level, level) * book.step
    return _scale_of(norm, along, squared, book, plan), code, centroid


def _encode_quads(x: EncodeInputs, pool: Any, at: Place, plan: EncodePlan) -> None:
    """Encodes vectors that channel quads hold."""
    fmt, interpret = plan.fmt, plan.interpret
    assert isinstance(fmt, CodebookFormat)
    [book] = fmt.segments
    parts, factor, norm = _rotated_quads(x, at, plan)
    if norm is None:
        squared = channel_quads.squares(parts, interpret=interpret)
        norm = perform("sqrt.approx.f32", squared, interpret=interpret) * factor  # [tile]
    codes, scale = [], norm
    has_tables = cell_offset(book) is not None and not interpret
    if book.bits:
        inverse = perform("rcp.approx.f32", jnp.where(norm > 0, norm, 1.0) * book.step, interpret=interpret)
        encode = _codes_by_table if has_tables else _codes_by_comparison
        parts, codes, along, squared = encode(x, parts, factor * inverse, book, plan)
        scale = _scale_of(norm, along, squared, book, plan)
    scale = scale.astype(fmt.scale_dtype)
    store_scalar(pool.scale, scale, at, None)
    for byte, data in channel_quads.packed(codes, book.bits):
        store_bytes(pool.packed, data.astype(jnp.uint8), plan.width, byte, at, channel_major=plan.channel_major)
    if fmt.residual:
        # Residuals are shorter than their vectors, but not by so much that planes would lose bits.
        up, down = row_scale([norm])  # [tile]
        unit = book.step / (SMALL if has_tables else 1.0)
        gain = scale.astype(jnp.float32) * (book.step * up)  # [tile]
        factor = norm * up * unit if plan.search else factor * up  # [tile]
        rest = by_comparison.residuals(parts, factor, codes, gain, book, interpret=interpret)
        store_residual(x, pool, channel_quads.tiles(rest), down, at, fmt, plan)


def _rotated_quads(
    x: EncodeInputs, at: Place, plan: EncodePlan
) -> tuple[list[ChannelQuad], jax.Array, jax.Array | None]:
    """Rotated vectors over their factors, the factors [tile], and the norms [tile] of the vectors where known."""
    if plan.hadamard:
        tiles, factor, norm = hadamard_vector(x, at, plan) if plan.tile == 1 else hadamard_tiles(x, at, plan)
        return channel_quads.quads(tiles), factor, norm
    rows, factor = vectors(x, at, plan)
    width = plan.width
    starts = range(0, plan.fmt.dim, width)
    # Tiles are [tile, n].
    if x.matrices:
        tiles = [times_columns(rows, x.matrices[0], slice(start, start + width)) for start in starts]
    else:
        # Adding zero turns negative zeros into positive ones.
        tiles = [load(x, at, start, width, plan).astype(jnp.float32) + 0.0 for start in starts]
    return channel_quads.quads(tiles), factor, None


Encoded = tuple[list[ChannelQuad], list[jax.Array], jax.Array, jax.Array]
"""Quads, of steps if the step is searched; codes [tile, n] of each quad; <s, q> and <q, q> [tile] of magnitudes s in
steps and levels q."""


def _codes_by_table(
    x: EncodeInputs, parts: list[ChannelQuad], unit: jax.Array, book: Codebook, plan: EncodePlan
) -> Encoded:
    """Encodes quads by tables.

    Args:
        x: The inputs.
        parts: Quads; if the step is searched they are returned as steps times SMALL.
        unit: [tile], positive; steps per unit of the quads.
        book: The codebook.
        plan: The plan.
    """
    # The assembler would move a known constant to a register before every use: it cannot know that a sign bit is zero.
    zero = lax.bitcast_convert_type(unit, jnp.int32) >> 31  # [tile]
    words = [zero | int(word) for word in tables(book)]  # [tile] each
    small = unit * SMALL
    if not plan.search:
        codes, along, squared = by_table.codes(parts, small, words, book)
        return parts, codes, along * unit, squared
    parts = channel_quads.scaled(parts, small)
    steps = channel_quads.in_rows(parts, rows_of_search(plan))
    magnitudes = channel_quads.in_rows([by_table.cut(quad, book) for quad in parts], rows_of_search(plan))

    def sums(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
        return by_table.sums(steps, magnitudes, inverse, words, book)

    codes, along, squared = by_table.codes(parts, best_inverse_multiple(x, sums, plan), words, book)
    return parts, codes, along * (1 / SMALL), squared


def _codes_by_comparison(
    x: EncodeInputs, parts: list[ChannelQuad], unit: jax.Array, book: Codebook, plan: EncodePlan
) -> Encoded:
    """Encodes quads by comparisons; arguments as of `_codes_by_table`, but searched quads are returned as steps."""
    if plan.search:
        parts = channel_quads.scaled(parts, unit)
        searched = channel_quads.in_rows(parts, rows_of_search(plan))

        def sums(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
            return by_comparison.sums(searched, inverse, book, searching=True, interpret=plan.interpret)

        unit = best_inverse_multiple(x, sums, plan)
    return parts, *by_comparison.codes(parts, unit, book, searching=plan.search, interpret=plan.interpret)


def _inverse_unit(scaled: jax.Array, book: Codebook, plan: EncodePlan) -> jax.Array:
    """Steps per unit of rotated vectors [tile, dim] whose norms are `scaled` [tile]."""
    one = jnp.ones_like(scaled)
    return perform("div.rn.f32", one, jnp.where(scaled > 0, scaled, one) * book.step, interpret=plan.interpret)


def _scale_of(norm: jax.Array, along: jax.Array, squared: jax.Array, book: Codebook, plan: EncodePlan) -> jax.Array:
    """Scalars to store, [tile]; see `reference.scale_of`."""
    divide = functools.partial(perform, "div.rn.f32", interpret=plan.interpret)
    root = functools.partial(perform, "sqrt.rn.f32", interpret=plan.interpret)
    return scale_of(norm, along, squared, book, plan.scale, divide=divide, root=root)


def _nearest(magnitude: jax.Array, book: Codebook, plan: EncodePlan) -> tuple[jax.Array, jax.Array]:
    """Levels nearest to magnitudes [tile, dim] in steps.

    Returns:
        int32 [tile, dim], the index in byte 0 at 8 bits and in byte 1 otherwise; float32 [tile, dim], the levels.
    """
    if book.bits == 8:
        floored = floor(jnp.minimum(magnitude, LARGEST_CELL), interpret=plan.interpret)
        bits, level = lax.bitcast_convert_type(floored, jnp.int32) & 255, floored - (UNSIGNED_ANCHOR - 0.5)
    else:
        # Every threshold that is passed adds the gap of the levels to byte 0 and one to byte 1.
        weights = [float(gap + 256) for gap in np.diff(book.levels)]
        count = above(magnitude, book.thresholds, weights, interpret=plan.interpret)
        bits = lax.bitcast_convert_type(count, jnp.int32)
        level = lax.bitcast_convert_type((bits & 255) | UNSIGNED_ANCHOR_BITS, jnp.float32) - (
            UNSIGNED_ANCHOR - book.levels[0] - 0.5
        )
        bits = bits & 0xFFFF
    return bits, mask_channels(level, book.dim)


def _store_code(
    ref: Any, code: jax.Array, packers: Sequence[Any], bits: int, dim: int, byte: int, at: Place, plan: EncodePlan
) -> None:
    """Packs int32 codes [tile, dim] plane by plane and stores them from a byte of the vector on."""
    if bits == 8:
        store_bytes(ref, code.astype(jnp.uint8), dim, byte, at, channel_major=plan.channel_major)
        return
    shift = 0
    for width, packer in zip(plane_widths(bits), packers, strict=True):
        plane = code if width == bits else (code >> shift) & ((1 << width) - 1)  # [tile, dim]
        size = packed_bytes(dim, width)
        store_bytes(ref, _packed(plane, packer[...]), size, byte, at, channel_major=plan.channel_major)
        byte, shift = byte + size, shift + width


def _packed(plane: jax.Array, packer: jax.Array) -> jax.Array:
    """Bytes [tile, bytes] of integers below 2**width [tile, dim] by a packer [dim, bytes].

    HALF_ANCHOR adds a multiple of 256 to every byte, which the cast to uint8 drops.
    """
    half = lax.bitcast_convert_type((plane | HALF_ANCHOR_BITS).astype(jnp.int16), jnp.float16)
    total = lax.dot_general(half, packer, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return lax.bitcast_convert_type(total + UNSIGNED_ANCHOR, jnp.int32).astype(jnp.uint8)


def _encode_groups(x: EncodeInputs, pool: Any, at: Place, fmt: GroupFormat, plan: EncodePlan) -> None:
    """Encodes min-max groups; see `reference.encode`."""
    tile = load(x, at, 0, padded_size(fmt.dim), plan)  # [tile, dim]
    groups = tile.reshape(plan.tile, tile.shape[1] // fmt.group, fmt.group)
    top = 2**fmt.bits - 1
    # Minima skip NaN; a sum of zeros does not.
    poison = jnp.sum(groups * 0.0, axis=2)  # [tile, groups]
    low, high = jnp.min(groups, axis=2) + poison, jnp.max(groups, axis=2) + poison
    scale, zero = ((high - low) * (1 / top)).astype(fmt.scale_dtype), low.astype(fmt.scale_dtype)
    number = lax.broadcasted_iota(jnp.int32, (1, low.shape[1]), 1)  # [1, groups]
    index = at.page[:, None], at.head, number, at.slot[:, None]
    mask = jnp.broadcast_to(at.valid[:, None], low.shape) & (number < fmt.num_scales)
    for ref, scalars in ((pool.scale, scale), (pool.zero, zero)):
        ref.store(scalars, mask, *index)
    wide = scale.astype(jnp.float32)
    one = jnp.ones_like(wide)
    inverse = perform("div.rn.f32", one, jnp.where(wide > LEAST_GROUP_SCALE, wide, one), interpret=plan.interpret)
    # Codes are rounded to the nearest integer by the sum with the anchor.
    codes = (groups - zero.astype(jnp.float32)[:, :, None]) * inverse[:, :, None]
    codes = jnp.minimum(jnp.maximum(codes, 0.0), float(top)) + UNSIGNED_ANCHOR
    plane = (lax.bitcast_convert_type(codes, jnp.int32) & top).reshape(tile.shape)  # [tile, dim]
    _store_code(pool.packed, plane, x.packers[0], fmt.bits, fmt.dim, 0, at, plan)
