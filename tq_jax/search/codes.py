"""Codes of vectors in the basis of an index: runs of channels of different widths, with one scale per vector."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, UInt8

from pallas_kernels.format import Code
from pallas_kernels.lookup import integers
from pallas_kernels.packing import pack, packed_bytes, unpack
from tq_jax.search.basis import LearnedBasis
from tq_jax.search.spec import IndexSpec, Widths, books, planes

STEP_MULTIPLES = np.linspace(0.76, 1.24, 7, dtype=np.float32)
"""Multiples of the step that the step search tries; more of them find no more neighbours."""

CELLS = 256
"""Cells of half a step that magnitudes are sorted into."""


def encode(
    x: Float[Array, "n dim"], basis: LearnedBasis, spec: IndexSpec, widths: Widths
) -> tuple[Code, Float[Array, "n"] | None]:
    """Encodes vectors; a NaN or infinite vector gets a scale that is not finite.

    Args:
        x: Vectors.
        basis: The basis of the index.
        spec: The spec of the index.
        widths: Runs of rotated channels of equal bits.

    Returns:
        Codes, and the second scalars (None unless `spec.has_offset`).
    """
    x = normalized(x) if spec.metric == "cosine" else x.astype(jnp.float32)
    factor, basis = basis.in_range()
    centred = x * factor - basis.mean[None]
    rotated = jnp.einsum("ni,ij->nj", centred, basis.rotation, precision=lax.Precision.HIGHEST)
    norm = jnp.sqrt(jnp.sum(rotated * rotated, axis=-1))
    steps = rotated / (jnp.where(norm > 0, norm, 1.0)[:, None] * jnp.where(basis.gain > 0, basis.gain, 1.0)[None])
    if spec.step_search:
        steps = steps / _best_multiple(jnp.abs(steps), basis.gain, widths)[:, None]
    packed = pack_runs(_codes(steps, widths, spec.dim), widths)
    centroids = (decode_integers(packed, spec, widths).astype(jnp.float32) + 0.5) * basis.gain[None]
    # The scale |x|^2 / <x, c> makes the estimate of <x, x> exact, see tq_jax.quantizer.
    along = jnp.sum(rotated * centroids, axis=-1)
    scale = jnp.where(norm > 0, norm * norm / jnp.where(along > 0, along, jnp.inf), norm)
    scale = scale if spec.scale == "unbiased" else norm
    code = Code(packed, (scale / basis.unit).astype(jnp.float16))
    if basis.sketch is not None:
        residual = rotated - centroids * (code.scale.astype(jnp.float32) * basis.unit)[:, None]
        signs = jnp.einsum("ni,ji->nj", residual, basis.sketch, precision=lax.Precision.HIGHEST) < 0
        length = jnp.sqrt(jnp.sum(residual * residual, axis=-1)) / basis.unit
        code = Code(packed, code.scale, signs=pack(signs.astype(jnp.uint8), 1), residual=length.astype(jnp.float16))
    if not spec.has_offset:
        return code, None
    second = -norm * norm if spec.metric == "l2" else jnp.sum(centred * basis.mean[None], axis=-1)
    return code, (second / offset_unit(basis, spec)).astype(jnp.float16)


def normalized(x: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """Vectors divided by their norms, float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    # Divided by its largest entry first, a vector has squares in range.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)


def offset_unit(basis: LearnedBasis, spec: IndexSpec) -> Float[Array, ""]:
    """The unit of the second scalars: float16 holds their multiples of it."""
    mean = jnp.sqrt(jnp.sum(basis.mean * basis.mean))
    return basis.unit * (basis.unit if spec.metric == "l2" else jnp.maximum(mean, basis.unit * 1e-3))


def decode_integers(
    packed: UInt8[Array, "_ _"], spec: IndexSpec, widths: Widths, *, axis: int = -1
) -> Int8[Array, "_ _"]:
    """The integers m of packed codes: a centroid is (m + 1/2) * gain; channels of 0 bits give 0.

    Args:
        packed: [n, bytes] for axis -1, [bytes, n] for axis -2.
        spec: The spec of the index.
        widths: Runs of rotated channels of equal bits.
        axis: The axis of the bytes, negative.

    Returns:
        The integers, with channels in place of bytes.
    """
    runs = zip(unpack_runs(packed, widths, axis=axis), books(widths, spec.dim), strict=True)
    parts = [integers(codes, book) if book.bits else codes.astype(jnp.int8) for codes, book in runs]
    return jnp.concatenate(parts, axis=axis)


def pack_runs(codes: list[UInt8[Array, "n _"]], widths: Widths) -> UInt8[Array, "n bytes"]:
    """Packs runs of codes in the layout of `tq_jax.search.spec.planes`."""
    packed = [jnp.zeros((codes[0].shape[0], 0), jnp.uint8)]
    for width, members in planes(widths):
        fields = [(codes[run] >> shift) & ((1 << width) - 1) for run, shift in members]
        packed.append(pack(jnp.concatenate(fields, axis=-1), width))
    return jnp.concatenate(packed, axis=-1)


def unpack_runs(packed: UInt8[Array, "_ _"], widths: Widths, *, axis: int = -1) -> list[UInt8[Array, "_ _"]]:
    """Inverse of `pack_runs` for bytes along any axis; codes take the place of the bytes."""
    shape, start = list(packed.shape), 0
    codes = []
    for count, _ in widths:
        shape[axis] = count
        codes.append(jnp.zeros(shape, jnp.uint8))
    for width, members in planes(widths):
        counts = [widths[run][0] for run, _ in members]
        size = packed_bytes(sum(counts), width)
        plane = lax.slice_in_dim(packed, start, start + size, axis=axis)
        fields, first = unpack(plane, width, sum(counts), axis=axis), 0
        for (run, shift), count in zip(members, counts, strict=True):
            codes[run] = codes[run] | (lax.slice_in_dim(fields, first, first + count, axis=axis) << shift)
            first += count
        start += size
    return codes


def _codes(steps: Float[Array, "n dim"], widths: Widths, dim: int) -> list[UInt8[Array, "n _"]]:
    """Nearest codes of rotated coordinates, given in steps; one array per run."""
    index = _look_up(_tables(widths, dim)[0], _cells(jnp.abs(steps)), widths)
    codes, start = [], 0
    for count, bits in widths:
        part, negative = index[:, start : start + count], steps[:, start : start + count] < 0
        start += count
        if bits == 8:  # the byte is the integer itself; the code of -x is the bitwise NOT of that of x
            codes.append(jnp.where(negative, ~part, part))
        else:
            codes.append(part | (negative.astype(jnp.uint8) << max(bits - 1, 0)) if bits else part)
    return codes


def _best_multiple(magnitude: Float[Array, "n dim"], gain: Float[Array, "dim"], widths: Widths) -> Float[Array, "n"]:
    """The multiple of the step whose centroids c leave the least squared error: the largest <y, c>^2 / |c|^2."""
    centroids = _tables(widths, magnitude.shape[1])[1]
    weighted = magnitude * gain[None]

    def consider(best: tuple[Array, Array], multiple: Array) -> tuple[tuple[Array, Array], None]:
        centroid = _look_up(centroids, _cells(magnitude / multiple), widths) * gain[None]
        along = jnp.sum(weighted * centroid, axis=-1)
        explained = along * along / jnp.sum(centroid * centroid, axis=-1)
        better = explained > best[0]
        return (jnp.where(better, explained, best[0]), jnp.where(better, multiple, best[1])), None

    start = (
        lax.full_like(magnitude, -1, shape=magnitude.shape[:1]),
        lax.full_like(magnitude, 1, shape=magnitude.shape[:1]),
    )
    (_, multiple), _ = lax.scan(consider, start, jnp.asarray(STEP_MULTIPLES))
    return multiple


def _cells(steps: Float[Array, "n dim"]) -> Int32[Array, "n dim"]:
    """The half step in which each magnitude lies; thresholds of codebooks lie only on the edges of half steps."""
    return jnp.minimum(steps * 2, CELLS - 1).astype(jnp.int32)


@functools.lru_cache(maxsize=64)
def _tables(widths: Widths, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Index and centroid of the magnitudes in each cell, CELLS entries per run."""
    edges, indices, centroids = np.arange(CELLS) / 2, [], []
    for book in books(widths, dim):
        index = np.searchsorted(book.thresholds, edges, side="right")
        indices.append(index)
        centroids.append(np.asarray(book.levels)[index] + 0.5)
    return np.concatenate(indices).astype(np.uint8), np.concatenate(centroids).astype(np.float32)


def _look_up(table: np.ndarray, cells: Int32[Array, "n dim"], widths: Widths) -> Array:
    """Entries of a table of `_tables`: each channel reads those of its run."""
    starts = np.repeat(np.arange(len(widths), dtype=np.int32) * CELLS, [count for count, _ in widths])
    return jnp.asarray(table).at[cells + starts[None]].get(mode="promise_in_bounds")
