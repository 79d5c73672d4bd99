"""The encode ops in plain jnp, float32: their definition.

All arithmetic of a codebook segment is in steps: a vector y of norm |y| becomes s = y / (|y| * step). Its codes are the
levels m + 1/2 nearest to |s|, and every scale follows from sum(|s| * (m + 1/2)) and sum((m + 1/2)^2). The second sum is
exact in float32.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.encode.arguments import EncodeArguments
from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.format import Code, Codebook, CodebookFormat, GroupFormat, ScaleDtype, ScaleRule, VectorFormat
from pallas_kernels.packing import pack
from pallas_kernels.pages import Pages, write_tokens

SEARCH_MULTIPLES = np.linspace(0.7, 1.3, 41, dtype=np.float32)
"""Multiples of the step that a search looks at: the best multiple of nearly every vector lies between the ends."""

INVERSE_MULTIPLES = 1 / SEARCH_MULTIPLES
"""Factors that turn steps into multiples of steps."""

COARSE = tuple(range(0, 41, 4))
"""Multiples that a search tries first, as places in SEARCH_MULTIPLES."""

FINE = (-2, -1, 1, 2)
"""Places relative to the best of COARSE that a search tries next. Gains are smooth but not unimodal; on random vectors
the error equals that of 31 multiples tried one by one, to three digits at all widths."""

OWN_STEP = 20
"""Place of the multiple 1 in SEARCH_MULTIPLES."""

LEAST_GROUP_SCALE = 1e-37
"""Min-max groups whose scale is not above this get codes of zero: the inverse of the scale might be no float."""


def encode_pages(arguments: EncodeArguments, pages: Pages) -> Pages:
    """The pages with the codes of the tokens written to their slots; see `pallas_kernels.encode.encode_pages`."""
    keys, slots = arguments.keys, arguments.slots
    if arguments.mean is not None and arguments.weight is not None:
        mean, weight = arguments.mean, arguments.weight
        if arguments.rows is not None:
            mean, weight = mean[arguments.rows], weight[arguments.rows]
        keys = (keys.astype(jnp.float32) - mean[:, None]) * weight[:, None]
    num_pages, page_size = pages.values.scale.shape[0], pages.values.scale.shape[-1]
    page = jnp.where(slots < 0, num_pages, slots // page_size)
    codes = [_encode_raw(x, encoder) for x, encoder in ((keys, arguments.key), (arguments.values, arguments.value))]
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
    """Codes of rotated vectors; see `pallas_kernels.encode.encode`."""
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
    """Codes of one segment at the codebook's own step or, with a search, at the best multiple of the step.

    A magnitude that is exactly a threshold gets the level below it.

    Returns:
        Codes; centroids of the codes, for vectors of norm one; the scale to store.
    """
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
    """A scalar in its stored type; the barrier keeps XLA from using the scalar before rounding later on."""
    return lax.optimization_barrier(scalar.astype(dtype))


def _nearest(magnitude: Float[Array, "*batch n"], book: Codebook) -> tuple[UInt8[Array, "*batch n"], Array]:
    """Index and value, in steps, of the level nearest to each magnitude in steps."""
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
    """1 / the multiple of the step whose levels q leave the least squared error, searched coarse to fine.

    The error is least where the gain <y, q>^2 / |q|^2 is largest.
    """
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
    """The scalar to store with each vector (arXiv 2604.18555).

    Args:
        norm: |y|.
        along: Sum of |s| * (m + 1/2), as the module says.
        squared: Sum of (m + 1/2)^2.
        book: The codebook.
        rule: The scale rule.
        divide: Division.
        root: Square root.
    """
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
    """|y|, with a gradient of zero at zero, where the gradient of the square root alone is NaN."""
    squared = jnp.sum(vectors * vectors, axis=-1)
    return jnp.where(squared == 0, 0.0, jnp.sqrt(jnp.where(squared == 0, 1.0, squared)))


def _encode_groups(vectors: Float[Array, "*batch dim"], fmt: GroupFormat) -> Code:
    """Asymmetric min-max codes, made for the scale and zero as they are stored, rounded."""
    groups = vectors.reshape(*vectors.shape[:-1], fmt.num_scales, fmt.group)
    low, high = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
    top = 2**fmt.bits - 1
    scale, zero = (_as_stored(x, fmt.scale_dtype) for x in ((high - low) * (1 / top), low))
    wide = scale.astype(jnp.float32)
    inverse = 1 / jnp.where(wide > LEAST_GROUP_SCALE, wide, 1.0)
    codes = jnp.round(jnp.clip((groups - zero.astype(jnp.float32)[..., None]) * inverse[..., None], 0, top))
    return Code(packed=pack(codes.astype(jnp.uint8).reshape(vectors.shape), fmt.bits), scale=scale, zero=zero)
