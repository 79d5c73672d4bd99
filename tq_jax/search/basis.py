"""The basis that is quantized: mean, rotation, and how many bits each rotated channel gets."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.format import Codebook
from tq_jax import rotation as rot
from tq_jax.codebook import distortion
from tq_jax.search.spec import IndexSpec, Widths, solved, widths_bytes

SAMPLE = 20_480
"""Vectors that the principal components are taken from, evenly spread over the sample given."""
MAX_BITS = 8
EXPONENT = 0.5
"""Errors of a component count variance**EXPONENT times: 0 is least squared error, 1 least error of inner products with
queries spread like the data. Neighbours differ little along components of large variance; halfway did well on both
word vectors and sentences."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedBasis:
    """Arrays that all vectors of an index share; a pytree, float32.

    Attributes:
        mean: [dim], zero if not centred.
        rotation: [dim, dim], orthogonal; a vector is rotated by multiplying from the left.
        gain: [dim], the step of each rotated channel's codebook for a vector of norm 1; zero for channels of 0 bits.
        unit: Typical norm of a vector less the mean; stored scalars are in units of it.
        sketch: Gaussian matrix [dim, dim] of Prod; None otherwise.
    """

    mean: jax.Array
    rotation: jax.Array
    gain: jax.Array
    unit: jax.Array
    sketch: jax.Array | None = None


def learn(sample: np.ndarray, spec: IndexSpec, *, seed: int) -> tuple[LearnedBasis, Widths]:
    """Takes mean, rotation and widths from a sample (metric "cosine": of unit vectors)."""
    mean = sample.mean(axis=0, dtype=np.float64) if spec.center else np.zeros(spec.dim)
    sample = sample[:: max(len(sample) // SAMPLE, 1)] - mean.astype(np.float32)
    unit = float(np.sqrt(np.mean(np.square(sample, dtype=np.float64).sum(axis=1)))) or 1.0
    if spec.basis == "random":
        widths: Widths = ((spec.dim, int(spec.bits) - (spec.kind == "prod")),)
        rotation, variance = np.eye(spec.dim), np.ones(spec.dim)
    else:
        variance, rotation = _components(sample / np.float32(unit))
        widths = allocate(variance, spec)
    rotation, gain, start = rotation.copy(), np.empty(spec.dim), 0
    for run, (count, bits) in enumerate(widths):
        part = slice(start, start + count)
        signs = np.asarray(rot.random_rotation("hadamard", count, (seed, 2 * run)), np.float64)
        rotation[:, part] = rotation[:, part] @ (signs[:, None] * rot.mixing_matrix(count))
        share = np.sqrt(max(variance[part].mean(), 1e-12) / max(variance.mean(), 1e-12))
        gain[part] = share * solved(spec.dim, bits).step
        start += count
    sketch = rot.gaussian((spec.dim, spec.dim), (seed, 1)) if spec.kind == "prod" else None
    mean, rotation, gain, unit = (jnp.asarray(array, jnp.float32) for array in (mean, rotation, gain, unit))
    sketch = None if sketch is None else jnp.asarray(sketch, jnp.float32)
    return LearnedBasis(mean, rotation, gain, unit, sketch), widths


def _components(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Second moments, descending, and the principal components as columns, each with its largest entry positive."""
    moments = (sample.T @ sample).astype(np.float64) / max(len(sample), 1)
    variance, columns = np.linalg.eigh(moments)
    variance, columns = np.maximum(variance[::-1], 0), columns[:, ::-1]
    largest = np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0)
    return variance, columns * np.where(largest < 0, -1, 1)


def allocate(variance: np.ndarray, spec: IndexSpec) -> Widths:
    """Bits of each component, one at a time to where it removes most weighted error, until the bytes are used.

    Args:
        variance: Of each component, descending.
        spec: Whose `code_bytes` are to be used.

    Example:
        >>> allocate(np.geomspace(1, 0.01, 16), IndexSpec(dim=16, bits=3))
        ((1, 6), (3, 5), (2, 4), (3, 3), (3, 2), (2, 1), (2, 0))
    """
    error = np.array([_gaussian_error(solved(spec.dim, bits)) for bits in range(MAX_BITS + 1)])
    worth = np.maximum(variance, variance.max() * 1e-12 + 1e-30) ** (1 + EXPONENT)
    gains = worth[:, None] * (error[:-1] - error[1:])
    order = np.argsort(-gains, axis=None, kind="stable")
    # Errors are convex in the bits, so the first entries of the order give every component its bits in sequence.
    ideal = int(spec.dim * spec.bits)
    for taken in range(ideal + 16, 0, -1):
        bits = np.bincount(order[:taken] // MAX_BITS, minlength=spec.dim)
        widths = _runs(bits)
        if widths_bytes(widths) <= spec.code_bytes:
            return widths
    return ((spec.dim, 0),)


def _gaussian_error(book: Codebook) -> float:
    return 1.0 if book.bits == 0 else distortion(book)


def _runs(bits: np.ndarray) -> Widths:
    edges = np.flatnonzero(np.diff(bits)) + 1
    starts = np.concatenate([[0], edges, [len(bits)]])
    return tuple((int(b - a), int(bits[a])) for a, b in itertools.pairwise(starts))
