"""The encode kernel: one program encodes a tile of tokens of one head and writes it into their pages.

    x [tokens, channels] -> centred, weighted -> y = x @ matrix -> codes -> bytes = codes @ packer -> pages

The rotation is a product of fp16 tensor cores, exact to float32 rounding: each row is scaled by a power of two and cut
into a high and a low fp16 plane, and so is the matrix unless its entries are signs. Packing is a product too: a packer
has 2**(w * i) where field i of a byte is a code's plane of width w, and sums below 2**23 are exact.

Integers live in the low bits of floats: 2**23 + n has the bits of n, and so does, in half precision, 1024 + n.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.encode import quads
from pallas_kernels.encode.assembly import MAGIC, MAGIC_BITS, above, floor, rounded
from pallas_kernels.encode.plan import Inputs, Plan
from pallas_kernels.encode.reference import COARSE, FINE, LEAST_GROUP_SCALE, OWN_STEP, scale_of
from pallas_kernels.format import Codebook, CodebookFormat, GroupFormat
from pallas_kernels.packing import packed_bytes, plane_widths

HALF_BITS = 0x6400
"""Bits of 1024 in half precision."""

TOP_EXPONENT = 12
"""Binary exponent of the largest channel of a row that is cut into fp16 planes."""

MATRIX_GAIN = 1024.0
"""Factor of the fp16 planes of a matrix, which keeps its low plane normal."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Row and token of each vector of a tile in the batch, page and slot in the pools; [tile] but for a common row."""

    row: jax.Array
    token: jax.Array
    head: jax.Array
    page: jax.Array
    slot: jax.Array
    valid: jax.Array


def encode_tile(x: Inputs, _: Any, pool: Any, *, plan: Plan) -> None:
    """The kernel body; the pools are updated in place."""
    at = _place(x, pool, plan)
    if isinstance(plan.fmt, GroupFormat):
        _encode_groups(x, pool, at, plan.fmt, plan)
        return
    rows, factor = _vectors(x, at, plan)
    first = plan.fmt.segments[0]
    if len(plan.fmt.segments) == 1 and not plan.fmt.residual and quads.runs(first):
        _encode_quads(x, pool, rows, factor, at, first, plan)
        return
    byte, channel = 0, 0
    for i, book in enumerate(plan.fmt.segments):
        y = _rotated(x, rows, at, i, channel, plan)
        scale, code, centroid = _quantize(x, y, factor, book, plan)
        stored = scale.astype(plan.fmt.scale_dtype)
        _store_scalar(pool.scale, stored, at, i if plan.fmt.num_scales > 1 else None)
        if book.bits:
            _store_code(pool.packed, code, x.packers[i], book.bits, book.dim, byte, at, plan)
        if plan.fmt.residual:
            residual = y * factor[:, None]
            if book.bits:
                residual = residual - centroid * stored.astype(jnp.float32)[:, None]
            _store_residual(x, pool, residual, at, plan.fmt, plan)
        byte, channel = byte + packed_bytes(book.dim, book.bits), channel + book.dim


def _place(x: Inputs, pool: Any, plan: Plan) -> _Place:
    index = pl.program_id(1) * plan.tile + lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)
    if plan.flat:
        count = jnp.full_like(index, plan.tokens)
        row, token, exists = lax.div(index, count), lax.rem(index, count), index < plan.rows * plan.tokens
    else:
        row, token, exists = jnp.full((1,), pl.program_id(2), jnp.int32), index, index < plan.tokens
    slot = plt.load(x.slots.at[jnp.broadcast_to(row, token.shape), token], mask=exists, other=-1)
    room = pool.scale.shape[0] * plan.page_size
    valid = (slot >= 0) & (slot < room)
    # Interpreted stores write back what they found where they are masked; behind the pool that harms nobody.
    slot = jnp.where(valid, slot, room)
    size = jnp.full_like(slot, plan.page_size)
    return _Place(row, token, pl.program_id(0), lax.div(slot, size), lax.rem(slot, size), valid)


def _load(x: Inputs, at: _Place, start: int, width: int, plan: Plan) -> jax.Array:
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
        place = tuple(jnp.broadcast_to(i, common) for i in (at.row[:, None], at.head, channel))
        if plan.flat:
            return plt.load(ref.at[place], mask=mask, other=0.0)
        return plt.load(ref.at[place], mask=channel < dim, other=0.0) if padded else plt.load(ref.at[place])

    return (out - statistic(x.mean)) * statistic(x.weight)


def _vectors(x: Inputs, at: _Place, plan: Plan) -> tuple[list[list[jax.Array]], jax.Array]:
    """Planes of each chunk of channels, and the factor that undoes the scaling of rows and matrix."""
    one = jnp.ones((plan.tile,), jnp.float32)
    if not x.matrices:
        return [], one
    padded = x.matrices[0][0].shape[0]
    chunks = [_load(x, at, start, plan.chunk, plan) for start in range(0, padded, plan.chunk)]
    if not plan.planes:
        return [[chunk] for chunk in chunks], one * plan.factor
    up, down = _row_scale([jnp.max(jnp.abs(chunk), axis=1) for chunk in chunks])
    return [_cut(chunk * up[:, None], plan.planes) for chunk in chunks], down * plan.factor


def _row_scale(largest: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The power of two that brings the largest magnitude of a row to 2**TOP_EXPONENT, and its inverse."""
    top = largest[0]
    for other in largest[1:]:
        top = jnp.maximum(top, other)
    exponent = 254 + TOP_EXPONENT - (lax.bitcast_convert_type(top, jnp.int32) >> 23)
    exponent = jnp.minimum(exponent, 253)
    up, down = exponent << 23, (254 - exponent) << 23
    return lax.bitcast_convert_type(up, jnp.float32), lax.bitcast_convert_type(down, jnp.float32)


def _cut(x: jax.Array, planes: int) -> list[jax.Array]:
    """A float32 tile as a sum of fp16 planes."""
    high = x.astype(jnp.float16)
    return [high] if planes == 1 else [high, (x - high.astype(jnp.float32)).astype(jnp.float16)]


def _product(left: list[jax.Array], right: Sequence[jax.Array]) -> jax.Array:
    """The product of two matrices in planes; that of both low ones is below rounding."""
    pairs = [(a, b) for i, b in enumerate(right) for j, a in enumerate(left) if i + j < 2]
    dot = [lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32) for a, b in pairs]
    return sum(dot[1:], dot[0])


def _rotated(x: Inputs, rows: list[list[jax.Array]], at: _Place, segment: int, channel: int, plan: Plan) -> jax.Array:
    """One segment of the rotated vectors, in units of the factor that `_vectors` gave."""
    assert isinstance(plan.fmt, CodebookFormat)
    if not x.matrices:
        dim = plan.fmt.segments[segment].dim
        tile = _load(x, at, channel, padded_size(dim), plan)
        return _mask_channels(tile, dim)
    return _times_columns(rows, x.matrices[segment], 0, x.matrices[segment][0].shape[1], plan)


def _times_columns(rows: list[list[jax.Array]], matrix: Sequence[Any], start: int, width: int, plan: Plan) -> jax.Array:
    """Vectors times columns start to start + width of a matrix."""
    y = None
    for i, planes in enumerate(rows):
        columns = slice(start, start + width)
        part = _product(planes, [ref[i * plan.chunk : (i + 1) * plan.chunk, columns] for ref in matrix])
        y = part if y is None else y + part
    assert y is not None
    return y


def _mask_channels(tile: jax.Array, dim: int) -> jax.Array:
    """Zero where there is no channel."""
    if tile.shape[1] == dim:
        return tile
    return jnp.where(lax.broadcasted_iota(jnp.int32, tile.shape, 1) < dim, tile, 0.0)


def padded_size(count: int) -> int:
    """The power of two, at least 16, that holds a number of channels or bytes."""
    return max(16, 1 << (count - 1).bit_length())


def _quantize(
    x: Inputs, y: jax.Array, factor: jax.Array, book: Codebook, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scale, int32 codes and centroids of one segment; see `reference.quantize_segment`."""
    scaled = rounded("sqrt.rn.f32", jnp.sum(y * y, axis=1), interpret=plan.interpret)
    norm = scaled * factor
    if book.bits == 0:
        return norm, y, y
    steps = y * _inverse_unit(scaled, book, plan)[:, None]
    magnitude = jnp.abs(steps)
    near = magnitude
    if plan.search and book.bits > 1:

        def sums(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
            _, level = _nearest(magnitude * inverse[:, None], book, plan)
            return jnp.sum(magnitude * level, axis=1), jnp.sum(level * level, axis=1)

        near = magnitude * _best_inverse_multiple(x, sums, plan)[:, None]
    bits, level = _nearest(near, book, plan)
    along, squared = jnp.sum(magnitude * level, axis=1), jnp.sum(level * level, axis=1)
    negative = steps < 0
    code = jnp.where(negative, bits ^ 255, bits) if book.bits == 8 else bits >> 8
    if book.bits < 8:
        code = (code & ((1 << (book.bits - 1)) - 1)) | jnp.where(negative, 1 << (book.bits - 1), 0)
    centroid = jnp.where(negative, -level, level) * book.step
    return _scale_of(norm, along, squared, book, plan), code, centroid


def _encode_quads(
    x: Inputs, pool: Any, rows: list[list[jax.Array]], factor: jax.Array, at: _Place, book: Codebook, plan: Plan
) -> None:
    """All of `encode_tile` where vectors are one segment that quads can hold."""
    count, interpret = quads.runs(book), plan.interpret
    width = book.dim // count
    if x.matrices:
        tiles = [_times_columns(rows, x.matrices[0], i * width, width, plan) for i in range(count)]
    else:
        # Adding zero leaves no negative zero.
        tiles = [_load(x, at, i * width, width, plan).astype(jnp.float32) + 0.0 for i in range(count)]
    parts = quads.quads(tiles)
    scaled = rounded("sqrt.rn.f32", quads.squares(parts, interpret=interpret), interpret=interpret)
    unit = _inverse_unit(scaled, book, plan)
    if plan.search:
        parts = quads.scaled(parts, unit)

        def sums(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
            return quads.sums(parts, inverse, book, searching=True, interpret=interpret)

        unit = _best_inverse_multiple(x, sums, plan)
    codes, along, squared = quads.codes(parts, unit, book, searching=plan.search, interpret=interpret)
    scale = _scale_of(scaled * factor, along, squared, book, plan)
    _store_scalar(pool.scale, scale.astype(plan.fmt.scale_dtype), at, None)
    for byte, data in quads.packed(codes, book.bits):
        _store_bytes(pool.packed, data.astype(jnp.uint8), width, byte, at, channel_major=plan.channel_major)


def _inverse_unit(scaled: jax.Array, book: Codebook, plan: Plan) -> jax.Array:
    """Steps per unit of the rotated vectors as they are."""
    one = jnp.ones_like(scaled)
    return rounded("div.rn.f32", one, jnp.where(scaled > 0, scaled, one) * book.step, interpret=plan.interpret)


def _scale_of(norm: jax.Array, along: jax.Array, squared: jax.Array, book: Codebook, plan: Plan) -> jax.Array:
    divide = functools.partial(rounded, "div.rn.f32", interpret=plan.interpret)
    root = functools.partial(rounded, "sqrt.rn.f32", interpret=plan.interpret)
    return scale_of(norm, along, squared, book, plan.scale, divide=divide, root=root)


def _best_inverse_multiple(
    x: Inputs, sums: Callable[[jax.Array], tuple[jax.Array, jax.Array]], plan: Plan
) -> jax.Array:
    """See `reference.best_inverse_multiple`; sums gives <|s|, q> and <q, q> of each row at inverse multiples."""

    def consider(best: tuple[jax.Array, jax.Array], place: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = plt.load(x.inverse.at[place])
        along, squared = sums(inverse)
        gain = rounded("div.rn.f32", along * along, squared, interpret=plan.interpret)
        better = gain > best[0]
        return jnp.where(better, gain, best[0]), jnp.where(better, place, best[1])

    def coarse(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return consider(best, jnp.full((plan.tile,), i * COARSE[1], jnp.int32))

    def fine(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        offset = i - len(FINE) // 2
        offset = offset + (offset >= 0).astype(jnp.int32)
        return consider(best, jnp.clip(middle + offset, 0, COARSE[-1]))

    start = jnp.full((plan.tile,), -1.0, jnp.float32), jnp.full((plan.tile,), OWN_STEP, jnp.int32)
    gain, middle = lax.fori_loop(0, len(COARSE), coarse, start)
    _, place = lax.fori_loop(0, len(FINE), fine, (gain, middle))
    return plt.load(x.inverse.at[place])


def _nearest(magnitude: jax.Array, book: Codebook, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Index (in the low byte at 8 bits, in the one above otherwise) and centroid in steps of the nearest levels."""
    if book.bits == 8:
        floored = floor(jnp.minimum(magnitude, 127.5), interpret=plan.interpret)
        bits, level = lax.bitcast_convert_type(floored, jnp.int32) & 255, floored - (MAGIC - 0.5)
    else:
        # Every threshold passed adds the gap of the levels to the low byte and one to the byte above.
        weights = [float(gap + 256) for gap in np.diff(book.levels)]
        count = above(magnitude, book.thresholds, weights, interpret=plan.interpret)
        bits = lax.bitcast_convert_type(count, jnp.int32)
        level = lax.bitcast_convert_type((bits & 255) | MAGIC_BITS, jnp.float32) - (MAGIC - book.levels[0] - 0.5)
        bits = bits & 0xFFFF
    return bits, _mask_channels(level, book.dim)


def _store_code(
    ref: Any, code: jax.Array, packers: Sequence[Any], bits: int, dim: int, byte: int, at: _Place, plan: Plan
) -> None:
    """Packs int32 codes plane by plane and stores them from a byte of the vector on."""
    if bits == 8:
        _store_bytes(ref, code.astype(jnp.uint8), dim, byte, at, channel_major=plan.channel_major)
        return
    shift = 0
    for width, packer in zip(plane_widths(bits), packers, strict=True):
        plane = code if width == bits else (code >> shift) & ((1 << width) - 1)
        size = packed_bytes(dim, width)
        _store_bytes(ref, _packed(plane, packer[...]), size, byte, at, channel_major=plan.channel_major)
        byte, shift = byte + size, shift + width


def _packed(plane: jax.Array, packer: jax.Array) -> jax.Array:
    """Bytes of a tile of integers below 256; the halves' 1024 adds multiples of 256 to every byte."""
    half = lax.bitcast_convert_type((plane | HALF_BITS).astype(jnp.int16), jnp.float16)
    total = lax.dot_general(half, packer, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return lax.bitcast_convert_type(total + MAGIC, jnp.int32).astype(jnp.uint8)


def _store_bytes(ref: Any, data: jax.Array, size: int, byte: int, at: _Place, *, channel_major: bool) -> None:
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


def _store_scalar(ref: Any, scalar: jax.Array, at: _Place, number: int | None) -> None:
    head = jnp.broadcast_to(at.head, at.page.shape)
    index = (at.page, head, at.slot) if number is None else (at.page, head, jnp.full_like(at.page, number), at.slot)
    plt.store(ref.at[index], scalar, mask=at.valid)


def _store_residual(x: Inputs, pool: Any, residual: jax.Array, at: _Place, fmt: CodebookFormat, plan: Plan) -> None:
    """Stores the signs of S r and |r| of a tile of residuals r."""
    norm = rounded("sqrt.rn.f32", jnp.sum(residual * residual, axis=1), interpret=plan.interpret)
    _store_scalar(pool.residual, norm.astype(fmt.scale_dtype), at, None)
    up, _ = _row_scale([jnp.max(jnp.abs(residual), axis=1)])
    planes, width = _cut(residual * up[:, None], 2), x.sketch[0].shape[1]
    step = min(width, plan.chunk)
    data = None
    for start in range(0, width, step):
        projected = _product(planes, [ref[:, start : start + step] for ref in x.sketch])
        half = lax.bitcast_convert_type(
            jnp.where(projected < 0, HALF_BITS + 1, HALF_BITS).astype(jnp.int16), jnp.float16
        )
        packer = x.signs[start : start + step, :]
        part = lax.dot_general(half, packer, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        data = part if data is None else data + part
    assert data is not None
    data = lax.bitcast_convert_type(data + MAGIC, jnp.int32).astype(jnp.uint8)
    _store_bytes(pool.signs, data, packed_bytes(fmt.dim, 1), 0, at, channel_major=False)


def _encode_groups(x: Inputs, pool: Any, at: _Place, fmt: GroupFormat, plan: Plan) -> None:
    """Min-max codes; see `reference`."""
    tile = _load(x, at, 0, padded_size(fmt.dim), plan)
    groups = tile.reshape(plan.tile, tile.shape[1] // fmt.group, fmt.group)
    top = 2**fmt.bits - 1
    # Minima skip NaN; the sum of zeros does not.
    poison = jnp.sum(groups * 0.0, axis=2)
    low, high = jnp.min(groups, axis=2) + poison, jnp.max(groups, axis=2) + poison
    scale, zero = ((high - low) * (1 / top)).astype(fmt.scale_dtype), low.astype(fmt.scale_dtype)
    number = lax.broadcasted_iota(jnp.int32, (1, low.shape[1]), 1)
    index = [jnp.broadcast_to(i, low.shape) for i in (at.page[:, None], at.head, number, at.slot[:, None])]
    mask = jnp.broadcast_to(at.valid[:, None], low.shape) & (number < fmt.num_scales)
    plt.store(pool.scale.at[tuple(index)], scale, mask=mask)
    plt.store(pool.zero.at[tuple(index)], zero, mask=mask)
    wide = scale.astype(jnp.float32)
    one = jnp.ones_like(wide)
    inverse = rounded("div.rn.f32", one, jnp.where(wide > LEAST_GROUP_SCALE, wide, one), interpret=plan.interpret)
    codes = (groups - zero.astype(jnp.float32)[:, :, None]) * inverse[:, :, None]
    codes = jnp.minimum(jnp.maximum(codes, 0.0), float(top)) + MAGIC
    plane = (lax.bitcast_convert_type(codes, jnp.int32) & top).reshape(tile.shape)
    _store_code(pool.packed, plane, x.packers[0], fmt.bits, fmt.dim, 0, at, plan)
