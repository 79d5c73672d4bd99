"""The encode ops in obvious jnp, float32: the definition.

All arithmetic of a codebook segment is in steps: a vector y of norm |y| becomes s = y / (|y| * step), whose codes are
the levels m + 1/2 nearest to |s|, and every scale follows from sum(|s| * (m + 1/2)) and sum((m + 1/2)^2), of which the
second is exact in float32.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.format import Code, Codebook, CodebookFormat, GroupFormat, ScaleDtype, ScaleRule, VectorFormat
from pallas_kernels.packing import pack
from pallas_kernels.pages import Pages, write_tokens

SEARCH_MULTIPLES = np.linspace(0.7, 1.3, 41, dtype=np.float32)
"""Multiples of the step that a search looks at: the best multiple of nearly every vector lies between the ends."""

INVERSE_MULTIPLES = 1 / SEARCH_MULTIPLES
COARSE = tuple(range(0, 41, 4))
"""Multiples that a search tries first, by place."""

FINE = (-2, -1, 1, 2)
"""Neighbours of the best of those that it tries then. Gains are smooth but not unimodal; of random vectors the error is
that of 31 multiples tried one by one, to three digits at all widths."""

OWN_STEP = 20
"""Place of the multiple 1."""

LEAST_GROUP_SCALE = 1e-37
"""Scales of min-max groups up to here, whose inverse is hardly a float, give codes of zero."""


def encode_pages(
    keys: Float[Array, "b t h d"],
    values: Float[Array, "b t h d"],
    pages: Pages,
    slots: Int[Array, "b t"],
    *,
    key: Encoder,
    value: Encoder,
    mean: Float[Array, "b h d"] | None,
    weight: Float[Array, "b h d"] | None,
) -> Pages:
    """See `pallas_kernels.encode.encode_pages`."""
    if mean is not None and weight is not None:
        keys = (keys.astype(jnp.float32) - mean[:, None]) * weight[:, None]
    num_pages, page_size = pages.values.scale.shape[0], pages.values.scale.shape[-1]
    page = jnp.where(slots < 0, num_pages, slots // page_size)
    codes = [_encode_raw(x, encoder) for x, encoder in ((keys, key), (values, value))]
    return write_tokens(pages, page, slots % page_size, *codes)


def _encode_raw(x: Float[Array, "*batch dim"], encoder: Encoder) -> Code:
    x = x.astype(jnp.float32)
    if encoder.matrix is not None:
        x = jnp.einsum("...i,ij->...j", x, encoder.matrix, precision=lax.Precision.HIGHEST)
    return encode(x, encoder.format, scale=encoder.scale, search=encoder.search, sketch=encoder.sketch)


def encode(
    vectors: Float[Array, "*batch dim"],
    fmt: VectorFormat,
    *,
    scale: ScaleRule,
    search: bool,
    sketch: Float[Array, "dim dim"] | None,
) -> Code:
    """See `pallas_kernels.encode.encode`."""
    vectors = vectors.astype(jnp.float32)
    if isinstance(fmt, GroupFormat):
        return _encode_groups(vectors, fmt)
    packed, scales, centroids, start = [], [], [], 0
    for book in fmt.segments:
        part = vectors[..., start : start + book.dim]
        codes, centroid, number = quantize_segment(part, book, scale=scale, search=search)
        packed.append(pack(codes, book.bits))
        scales.append(_as_stored(number, fmt.scale_dtype))
        centroids.append(centroid)
        start += book.dim
    stored = scales[0] if len(scales) == 1 else jnp.stack(scales, axis=-1)
    code = Code(packed=jnp.concatenate(packed, axis=-1), scale=stored)
    if sketch is None:
        return code
    residual = vectors - centroids[0] * stored.astype(jnp.float32)[..., None]
    return _with_residual(code, residual, fmt, sketch)


def quantize_segment(
    part: Float[Array, "*batch n"], book: Codebook, *, scale: ScaleRule, search: bool
) -> tuple[UInt8[Array, "*batch n"], Float[Array, "*batch n"], Float[Array, "*batch"]]:
    """Codes of one segment at the codebook's own step or the best multiple of it, their centroids, the scale."""
    norm = _norm(part)
    if book.bits == 0:
        return jnp.zeros(part.shape, jnp.uint8), jnp.zeros_like(part), norm
    steps = part * (1 / (jnp.where(norm > 0, norm, 1.0) * book.step))[..., None]
    magnitude = jnp.abs(steps)
    near = magnitude
    if search and book.bits > 1:
        near = magnitude * best_inverse_multiple(magnitude, book)[..., None]
    index, level = _nearest(near, book)
    along, squared = jnp.sum(magnitude * level, axis=-1), jnp.sum(level * level, axis=-1)
    negative = steps < 0
    if book.bits == 8:
        codes = index ^ jnp.where(negative, np.uint8(255), np.uint8(0))
    else:
        codes = index | (negative.astype(jnp.uint8) << (book.bits - 1))
    centroid = jnp.where(negative, -level, level) * book.step
    return codes, centroid, scale_of(norm, along, squared, book, scale)


def _as_stored(scalar: Array, dtype: ScaleDtype) -> Array:
    """A scalar in its stored type; the barrier keeps XLA from working on with the one that is not rounded."""
    return lax.optimization_barrier(scalar.astype(dtype))


def _nearest(magnitude: Float[Array, "*batch n"], book: Codebook) -> tuple[UInt8[Array, "*batch n"], Array]:
    """Index and centroid, in steps, of the nearest level."""
    if book.bits == 8:
        level = jnp.minimum(jnp.floor(magnitude), 127.0)
        return level.astype(jnp.uint8), level + 0.5
    index, level = jnp.zeros(magnitude.shape, jnp.uint8), jnp.full(magnitude.shape, book.levels[0] + 0.5, jnp.float32)
    for threshold, gap in zip(book.thresholds, np.diff(book.levels), strict=True):
        above = magnitude > threshold
        index = index + above.astype(jnp.uint8)
        level = level + jnp.where(above, np.float32(gap), np.float32(0))
    return index, level


def best_inverse_multiple(magnitude: Float[Array, "*batch n"], book: Codebook) -> Float[Array, "*batch"]:
    """1 / the multiple whose codes q leave the least squared error, the largest <y, q>^2 / |q|^2, coarse to fine."""
    inverse = jnp.asarray(INVERSE_MULTIPLES)

    def consider(best: tuple[Array, Array], place: Array) -> tuple[tuple[Array, Array], None]:
        place = jnp.broadcast_to(place, vectors)
        _, level = _nearest(magnitude * inverse[place][..., None], book)
        along = jnp.sum(magnitude * level, axis=-1)
        gain = along * along / jnp.sum(level * level, axis=-1)
        better = gain > best[0]
        return (jnp.where(better, gain, best[0]), jnp.where(better, place, best[1])), None

    def consider_near(best: tuple[Array, Array], offset: Array) -> tuple[tuple[Array, Array], None]:
        return consider(best, jnp.clip(middle + offset, 0, COARSE[-1]))

    vectors = magnitude.shape[:-1]
    start = lax.full_like(magnitude, -1, jnp.float32, vectors), lax.full_like(magnitude, OWN_STEP, jnp.int32, vectors)
    (gain, middle), _ = lax.scan(consider, start, jnp.asarray(COARSE, jnp.int32))
    (_, place), _ = lax.scan(consider_near, (gain, middle), jnp.asarray(FINE, jnp.int32))
    return inverse[place]


def scale_of(
    norm: Array,
    along: Array,
    squared: Array,
    book: Codebook,
    rule: ScaleRule,
    *,
    divide: Callable[[Array, Array], Array] = jnp.divide,
    root: Callable[[Array], Array] = jnp.sqrt,
) -> Array:
    """The scalar to store: norm is |y|, along and squared are sums over s as the module says (arXiv 2604.18555)."""
    if rule == "norm":
        return norm
    if rule == "matched":
        return divide(norm, root(squared) * book.step)
    if rule == "least_squares":
        return norm * divide(along, squared)
    # A zero vector has along = 0 and is stored with scale 0, which reconstructs it exactly.
    return divide(norm, jnp.where(along == 0, 1.0, along) * book.step**2)


def _with_residual(code: Code, residual: Array, fmt: CodebookFormat, sketch: Array) -> Code:
    """Adds the signs of S r and |r| of the residual r (Algorithm 2)."""
    projected = jnp.einsum("ij,...j->...i", sketch, residual, precision=lax.Precision.HIGHEST)
    norm = _norm(residual).astype(fmt.scale_dtype)
    return Code(code.packed, code.scale, signs=pack((projected < 0).astype(jnp.uint8), 1), residual=norm)


def _norm(vectors: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """|y|, whose gradient at zero is zero; that of the square root alone is NaN."""
    squared = jnp.sum(vectors * vectors, axis=-1)
    return jnp.where(squared == 0, 0.0, jnp.sqrt(jnp.where(squared == 0, 1.0, squared)))


def _encode_groups(vectors: Float[Array, "*batch dim"], fmt: GroupFormat) -> Code:
    """Asymmetric min-max codes; the stored, rounded scale and zero are the ones the codes are made for."""
    groups = vectors.reshape(*vectors.shape[:-1], fmt.num_scales, fmt.group)
    low, high = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
    top = 2**fmt.bits - 1
    scale, zero = (_as_stored(x, fmt.scale_dtype) for x in ((high - low) * (1 / top), low))
    wide = scale.astype(jnp.float32)
    inverse = 1 / jnp.where(wide > LEAST_GROUP_SCALE, wide, 1.0)
    codes = jnp.round(jnp.clip((groups - zero.astype(jnp.float32)[..., None]) * inverse[..., None], 0, top))
    return Code(packed=pack(codes.astype(jnp.uint8).reshape(vectors.shape), fmt.bits), scale=scale, zero=zero)
