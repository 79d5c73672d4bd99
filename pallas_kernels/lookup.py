"""From packed bytes to centroids, in plain jnp: the definition that kernels follow."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.format import Code, Codebook, CodebookFormat, GroupFormat, VectorFormat
from pallas_kernels.packing import packed_bytes, unpack


def integers(codes: UInt8[Array, "*batch dim"], book: Codebook) -> Int8[Array, "*batch dim"]:
    """The int8 integers m of sign-magnitude codes; the centroid is (m + 1/2) * book.step.

    Args:
        codes: One code per byte.
        book: The codebook.

    Example:
        >>> book = Codebook(dim=64, bits=2, levels=(38, 127), step=0.0015)
        >>> integers(jnp.array([0, 1, 2, 3], jnp.uint8), book)
        Array([  38,  127,  -39, -128], dtype=int8)
    """
    if book.bits == 8:
        return lax.bitcast_convert_type(codes, jnp.int8)
    # A sum of selected gaps instead of a table, because kernels cannot capture a table and run this, too.
    index = codes & (len(book.levels) - 1)
    magnitude = jnp.full(codes.shape, book.levels[0], jnp.int8)
    for i, gap in enumerate(np.diff(np.asarray(book.levels, np.int8))):
        magnitude = magnitude + jnp.where(index > i, gap, np.int8(0))
    return magnitude ^ -lax.bitcast_convert_type(codes >> (max(book.bits, 1) - 1), jnp.int8)


def _look_up(table: np.ndarray, codes: UInt8[Array, "..."]) -> Array:
    """Entries of a table; codes are below 2**bits, and without a bounds check compilers vectorize the lookup."""
    return jnp.asarray(table).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def centroid_vectors(
    packed: UInt8[Array, "..."], fmt: CodebookFormat, *, axis: int = -1
) -> tuple[Float[Array, "..."], ...]:
    """Centroids of packed codes before scaling, float32, one array per segment.

    Args:
        packed: Packed bytes along `axis`.
        fmt: The format that they were written in.
        axis: Axis of the bytes, which becomes the axis of the channels; counted from the end, so negative.
    """
    parts, start = [], 0
    for book in fmt.segments:
        size = packed_bytes(book.dim, book.bits)
        codes = unpack(lax.slice_in_dim(packed, start, start + size, axis=axis), book.bits, book.dim, axis=axis)
        parts.append(_centroids(codes, book))
        start += size
    return tuple(parts)


def _centroids(codes: UInt8[Array, "..."], book: Codebook) -> Float[Array, "..."]:
    """(m + 1/2) * step of sign-magnitude codes, float32."""
    if book.bits == 8:
        return (integers(codes, book).astype(jnp.float32) + 0.5) * book.step
    half = book.centroids.size // 2
    return _look_up(np.concatenate([book.centroids[half:], book.centroids[:half][::-1]]), codes)


def decode(code: Code, fmt: VectorFormat, *, axis: int = -1) -> Float[Array, "..."]:
    """Reconstructs vectors in the rotated basis, float32, without the sketch of the residual.

    Args:
        code: Arrays as `Code` documents them, or with bytes and several scales along another axis.
        fmt: The format that they were written in.
        axis: Axis of the bytes and of several scales, which becomes the axis of the channels; negative.

    Returns:
        Rotated vectors; for a GroupFormat, which does not rotate, the vectors themselves.
    """
    scale = code.scale.astype(jnp.float32)
    if isinstance(fmt, GroupFormat):
        assert code.zero is not None
        codes = unpack(code.packed, fmt.bits, fmt.dim, axis=axis).astype(jnp.float32)
        split = codes.ndim + axis
        groups = codes.reshape(*codes.shape[:split], fmt.num_scales, fmt.group, *codes.shape[split + 1 :])
        scale, zero = jnp.expand_dims(scale, axis), jnp.expand_dims(code.zero.astype(jnp.float32), axis)
        return (groups * scale + zero).reshape(codes.shape)
    parts = centroid_vectors(code.packed, fmt, axis=axis)
    if fmt.num_scales == 1:
        return parts[0] * jnp.expand_dims(scale, axis)
    scaled = [part * lax.slice_in_dim(scale, i, i + 1, axis=axis) for i, part in enumerate(parts)]
    return jnp.concatenate(scaled, axis=axis)


def residual_signs(code: Code, fmt: CodebookFormat) -> Float[Array, "*batch dim"]:
    """Signs of the sketched residual, +1 and -1.

    Args:
        code: Codes with `signs`.
        fmt: The format that they were written in.
    """
    assert code.signs is not None
    return 1.0 - 2.0 * unpack(code.signs, 1, fmt.dim).astype(jnp.float32)
