"""The encode op in obvious jnp, float32: the definition."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.format import Code, Codebook, CodebookFormat, GroupFormat, ScaleRule, VectorFormat
from pallas_kernels.lookup import centroid_vectors
from pallas_kernels.packing import pack

# Multiples of the step that a search tries: the best multiple of nearly every vector lies between the ends.
SEARCH_MULTIPLES = np.linspace(0.7, 1.3, 31, dtype=np.float32)


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
    packed, scales, start = [], [], 0
    for book in fmt.segments:
        part = vectors[..., start : start + book.dim]
        codes = quantize_segment(part, book, search=search)
        packed.append(pack(codes, book.bits))
        scales.append(_scale(part, packed[-1], book, scale))
        start += book.dim
    stored = (scales[0] if len(scales) == 1 else jnp.stack(scales, axis=-1)).astype(fmt.scale_dtype)
    code = Code(packed=jnp.concatenate(packed, axis=-1), scale=stored)
    return _with_residual(code, vectors, fmt, sketch) if sketch is not None else code


def quantize_segment(part: Float[Array, "*batch n"], book: Codebook, *, search: bool) -> UInt8[Array, "*batch n"]:
    """Nearest codes of one segment, at the codebook's own step or the best of SEARCH_MULTIPLES of it."""
    if book.bits == 0:
        return jnp.zeros(part.shape, jnp.uint8)
    norm = jnp.sqrt(jnp.sum(part * part, axis=-1, keepdims=True))
    # The division by the norm comes first so that tiny and huge vectors keep their precision.
    steps = part / jnp.where(norm > 0, norm, 1.0) * (1 / book.step)
    if search and book.bits > 1:
        steps = steps / _best_multiple(jnp.abs(steps), book)[..., None]
    negative = steps < 0
    if book.bits == 8:
        return lax.bitcast_convert_type(jnp.clip(jnp.floor(steps), -128, 127).astype(jnp.int8), jnp.uint8)
    index = _above(jnp.abs(steps), book, np.ones(len(book.levels) - 1, np.uint8))
    return index | (negative.astype(jnp.uint8) << (book.bits - 1))


def _above(magnitude: Array, book: Codebook, weights: np.ndarray) -> Array:
    """Sum of weights[i] over the thresholds i that lie below each magnitude."""
    total = jnp.zeros(magnitude.shape, weights.dtype)
    for threshold, weight in zip(book.thresholds, weights, strict=True):
        total = total + jnp.where(magnitude > threshold, weight, weight.dtype.type(0))
    return total


def _best_multiple(magnitude: Float[Array, "*batch n"], book: Codebook) -> Float[Array, "*batch"]:
    """The multiple of the step whose codes q leave the least squared error: the largest <y, q>^2 / |q|^2."""
    gaps = np.diff(np.asarray(book.levels, np.float32))

    def nearest(steps: Array) -> Array:
        if book.bits == 8:
            return jnp.clip(jnp.floor(steps), 0, 127) + 0.5
        return book.levels[0] + 0.5 + _above(steps, book, gaps)

    def consider(best: tuple[Array, Array], multiple: Array) -> tuple[tuple[Array, Array], None]:
        centroid = nearest(magnitude / multiple)
        along = jnp.sum(magnitude * centroid, axis=-1)
        gain = along * along / jnp.sum(centroid * centroid, axis=-1)
        better = gain > best[0]
        return (jnp.where(better, gain, best[0]), jnp.where(better, multiple, best[1])), None

    vectors = magnitude.shape[:-1]
    start = lax.full_like(magnitude, -1, jnp.float32, vectors), lax.full_like(magnitude, 1, jnp.float32, vectors)
    (_, multiple), _ = lax.scan(consider, start, jnp.asarray(SEARCH_MULTIPLES))
    return multiple


def _scale(
    part: Float[Array, "*batch n"], packed: UInt8[Array, "*batch bytes"], book: Codebook, rule: ScaleRule
) -> Float[Array, "*batch"]:
    """The scalar to store for codes whose centroid vector is q (arXiv 2604.18555 for "unbiased")."""
    squared_norm = jnp.sum(part * part, axis=-1)
    if rule == "norm" or book.bits == 0:
        return jnp.sqrt(squared_norm)
    (q,) = centroid_vectors(packed, CodebookFormat(segments=(book,)))
    q_squared, along = jnp.sum(q * q, axis=-1), jnp.sum(part * q, axis=-1)
    if rule == "matched":
        return jnp.sqrt(squared_norm / q_squared)
    if rule == "least_squares":
        return along / q_squared
    # A zero vector has along = 0 and is stored with scale 0, which reconstructs it exactly.
    return jnp.where(squared_norm == 0, 0.0, squared_norm / jnp.where(along == 0, 1.0, along))


def _with_residual(code: Code, vectors: Array, fmt: CodebookFormat, sketch: Array) -> Code:
    """Adds the signs of S r and |r| of the residual r (Algorithm 2)."""
    (q,) = centroid_vectors(code.packed, fmt)
    residual = vectors - q * code.scale.astype(jnp.float32)[..., None]
    projected = jnp.einsum("ij,...j->...i", sketch, residual, precision=lax.Precision.HIGHEST)
    norm = jnp.sqrt(jnp.sum(residual * residual, axis=-1)).astype(fmt.scale_dtype)
    return Code(code.packed, code.scale, signs=pack((projected < 0).astype(jnp.uint8), 1), residual=norm)


def _encode_groups(vectors: Float[Array, "*batch dim"], fmt: GroupFormat) -> Code:
    """Asymmetric min-max codes; the stored, rounded scale and zero are the ones the codes are made for."""
    groups = vectors.reshape(*vectors.shape[:-1], fmt.num_scales, fmt.group)
    low, high = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
    top = 2**fmt.bits - 1
    scale, zero = ((high - low) / top).astype(fmt.scale_dtype), low.astype(fmt.scale_dtype)
    divisor = jnp.where(scale > 0, scale.astype(jnp.float32), 1.0)[..., None]
    codes = jnp.clip(jnp.round((groups - zero.astype(jnp.float32)[..., None]) / divisor), 0, top)
    return Code(packed=pack(codes.astype(jnp.uint8).reshape(vectors.shape), fmt.bits), scale=scale, zero=zero)
