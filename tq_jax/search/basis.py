"""The basis in which vectors are quantized: mean, rotation, and the bits of each rotated channel."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.format import Codebook
from pallas_kernels.pytree import pytree
from tq_jax import rotation as rot
from tq_jax.codebook import distortion
from tq_jax.search.spec import IndexSpec, Widths, solved, widths_bytes

SAMPLE = 20_480
"""Vectors that give the principal components, evenly spread over the sample."""

MAX_BITS = 8
"""Most bits of a channel."""

EXPONENT = 0.5
"""The squared error of a component is weighted by variance**EXPONENT: 0 gives the least squared error, 1 the least
error of inner products with queries spread like the data. Neighbours differ little along components of large variance;
0.5 did well on both word vectors and sentences."""


@pytree
class LearnedBasis:
    """Arrays that all vectors of an index share; a pytree, float32.

    Attributes:
        mean: [dim], zero if vectors are not centred.
        rotation: [dim, dim], orthogonal; a rotated vector is x @ rotation.
        gain: [dim], the step of each rotated channel's codebook for a vector of norm 1; zero for channels of 0 bits.
        unit: Typical norm of a vector less the mean; stored scalars are multiples of it.
        sketch: Gaussian matrix [dim, dim] of kind "prod"; None for kind "mse".
    """

    mean: jax.Array
    rotation: jax.Array
    gain: jax.Array
    unit: jax.Array
    sketch: jax.Array | None = None

    def in_range(self) -> tuple[jax.Array, "LearnedBasis"]:
        """A power of two, and the basis of vectors times it: their typical norm is near 1, so squares are in range."""
        factor = power_of_two_over(self.unit)
        return factor, dataclasses.replace(self, mean=self.mean * factor, unit=self.unit * factor)


def power_of_two_over(size: Float[Array, "..."]) -> Float[Array, "..."]:
    """The power of two that takes a size to [1/2, 1); products with it are exact. 1 for zero and for infinity.

    Example:
        >>> float(power_of_two_over(jnp.float32(5.0)))
        0.125
    """
    exponent = jnp.where(jnp.isfinite(size), jnp.frexp(size)[1], 0)
    return jnp.ldexp(jnp.ones_like(size), jnp.clip(-exponent, -126, 126))


def learn(sample: np.ndarray, spec: IndexSpec, *, seed: int) -> tuple[LearnedBasis, Widths]:
    """Learns mean, rotation and widths from a sample; for metric "cosine", a sample of unit vectors.

    Raises:
        ValueError: If the typical norm of a vector less the mean is outside the range of float32.
    """
    mean = sample.mean(axis=0, dtype=np.float64) if spec.center else np.zeros(spec.dim)
    with np.errstate(over="ignore"):  # the norm tells
        sample = sample[:: max(len(sample) // SAMPLE, 1)] - mean.astype(np.float32)
    unit = float(np.sqrt(np.mean(np.square(sample, dtype=np.float64).sum(axis=1)))) or 1.0
    least, most = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
    if not least <= unit <= most:
        raise ValueError(
            f"expected vectors less their mean of norms from {least:.3g} to {most:.3g}, the range of float32, got "
            f"{unit:.3g}"
        )
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
    """Second moments, descending, and principal components as columns whose largest entries are positive."""
    moments = (sample.T @ sample).astype(np.float64) / max(len(sample), 1)
    variance, columns = np.linalg.eigh(moments)
    variance, columns = np.maximum(variance[::-1], 0), columns[:, ::-1]
    largest = np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0)
    return variance, columns * np.where(largest < 0, -1, 1)


def allocate(variance: np.ndarray, spec: IndexSpec) -> Widths:
    """Gives bits to components, each to the one whose weighted error it reduces most, until the bytes are used.

    Args:
        variance: Variance of each component, descending.
        spec: The spec whose `code_bytes` limit the codes.

    Returns:
        Runs of components of equal bits.

    Example:
        >>> allocate(np.geomspace(1, 0.01, 16), IndexSpec(dim=16, bits=3))
        ((1, 6), (3, 5), (2, 4), (3, 3), (3, 2), (2, 1), (2, 0))
    """
    error = np.array([_gaussian_error(solved(spec.dim, bits)) for bits in range(MAX_BITS + 1)])
    worth = np.maximum(variance, variance.max() * 1e-12 + 1e-30) ** (1 + EXPONENT)
    gains = worth[:, None] * (error[:-1] - error[1:])
    order = np.argsort(-gains, axis=None, kind="stable")
    # Errors are convex in the bits, so any first entries of the order give each component its bits in sequence.
    ideal = int(spec.dim * spec.bits)
    for taken in range(ideal + 16, 0, -1):
        bits = np.bincount(order[:taken] // MAX_BITS, minlength=spec.dim)
        widths = _runs(bits)
        if widths_bytes(widths) <= spec.code_bytes:
            return widths
    return ((spec.dim, 0),)


def _gaussian_error(book: Codebook) -> float:
    """Expected squared error of a coordinate relative to its variance; 1 without bits."""
    return 1.0 if book.bits == 0 else distortion(book)


def _runs(bits: np.ndarray) -> Widths:
    """Runs of equal bits."""
    edges = np.flatnonzero(np.diff(bits)) + 1
    starts = np.concatenate([[0], edges, [len(bits)]])
    return tuple((int(b - a), int(bits[a])) for a, b in itertools.pairwise(starts))
