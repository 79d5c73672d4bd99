"""Random rotations: randomized Hadamard transforms and dense Haar matrices, as matrix products.

"hadamard" multiplies the channels by random signs and then by the orthogonal matrix C_m (x) H_p. Here p is the largest
power of two that divides the dimension, m = dim / p, H_p is the Walsh-Hadamard matrix of each of the m blocks, and C_m
is the discrete Hartley matrix, which mixes the blocks; if the dimension is a power of two, C_m is 1. "haar" is a
uniformly random orthogonal matrix (arXiv 2504.19874, Algorithm 1). Both give the same distortion on real data.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy import linalg, special

RotationKind = Literal["hadamard", "haar"]


def random_rotation(kind: RotationKind, dim: int, seed: tuple[int, int]) -> Float[Array, "..."]:
    """Draws the stored part of a rotation: signs [dim] for "hadamard", a matrix [dim, dim] for "haar"; float32.

    The random numbers come from Philox bits, so the same seed gives the same rotation on every platform and version.
    """
    if kind == "hadamard":
        bits = np.random.Philox(key=np.asarray(seed, np.uint64)).random_raw(dim)
        return jnp.asarray(np.where(bits >> np.uint64(63), -1.0, 1.0), jnp.float32)
    q, r = np.linalg.qr(gaussian((dim, dim), seed))
    return jnp.asarray(q * np.sign(np.diagonal(r)), jnp.float32)


def gaussian(shape: tuple[int, ...], seed: tuple[int, int]) -> np.ndarray:
    """Draws independent standard normals, float64; the same seed gives the same numbers on every platform."""
    bits = np.random.Philox(key=np.asarray(seed, np.uint64)).random_raw(int(np.prod(shape)))
    return special.ndtri(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53).reshape(shape)


def rotate(rotation: Float[Array, "..."], x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Applies a rotation to the last axis, in float32 at full precision on every device.

    Args:
        rotation: Signs or matrix from `random_rotation`.
        x: Vectors of any float type.

    Returns:
        The rotated vectors, float32.

    Example:
        >>> signs = random_rotation("hadamard", 64, seed=(0, 0))
        >>> y = rotate(signs, jnp.ones((3, 64)))
        >>> bool(jnp.allclose(jnp.linalg.norm(y, axis=-1), 8.0)), bool(jnp.allclose(unrotate(signs, y), 1.0))
        (True, True)
    """
    x = x.astype(jnp.float32)
    if rotation.ndim == 1:
        return _times(x * _along_last(rotation, x.ndim), mixing_matrix(rotation.shape[0]))
    return _times(x, rotation.T)


def unrotate(rotation: Float[Array, "..."], y: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Applies the inverse of `rotate`."""
    y = y.astype(jnp.float32)
    if rotation.ndim == 1:
        return _times(y, mixing_matrix(rotation.shape[0]).T) * _along_last(rotation, y.ndim)
    return _times(y, rotation)


def matrix(rotation: Float[Array, "..."]) -> Float[Array, "dim dim"]:
    """The matrix M of a rotation: `rotate` returns x @ M."""
    return rotation[:, None] * mixing_matrix(rotation.shape[0]) if rotation.ndim == 1 else rotation.T


def _times(x: Array, matrix: Array | np.ndarray) -> Array:
    return jnp.einsum("...i,ij->...j", x, matrix, precision=lax.Precision.HIGHEST)


def _along_last(vector: jax.Array, ndim: int) -> jax.Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


@functools.lru_cache(maxsize=32)
def mixing_matrix(dim: int) -> np.ndarray:
    """The fixed orthogonal matrix of the Hadamard rotation, float32 [dim, dim].

    Example:
        >>> mixing_matrix(2).tolist() == (np.array([[1, 1], [1, -1]], np.float32) * np.float32(0.5**0.5)).tolist()
        True
    """
    matrix = np.kron(*(factor.astype(np.float64) for factor in _factors(dim))).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def mixing_factors(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Two small symmetric orthogonal matrices, float32, whose Kronecker product is `mixing_matrix`.

    Example:
        >>> outer, inner = mixing_factors(96)
        >>> outer.shape, inner.shape, bool(np.allclose(np.kron(outer, inner), mixing_matrix(96), atol=1e-7))
        ((6, 6), (16, 16), True)
    """
    outer, inner = (factor.astype(np.float32) for factor in _factors(dim))
    return outer, inner


def _factors(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of `mixing_matrix`, float64; the inner one is a Hadamard matrix of at most 16 rows."""
    power = dim & -dim
    blocks, inner = dim // power, min(power, 16)
    angle = 2 * np.pi / blocks * np.outer(np.arange(blocks), np.arange(blocks))
    hartley = (np.cos(angle) + np.sin(angle)) / blocks**0.5
    rest = power // inner
    return np.kron(hartley, linalg.hadamard(rest) / rest**0.5), linalg.hadamard(inner) / inner**0.5
