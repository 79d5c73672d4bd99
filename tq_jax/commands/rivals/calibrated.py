"""Rivals that are calibrated: rotations and bits of their own for each layer and KV head.

They are calibrated on the very text that they then store, which flatters them: their authors use other texts.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.pytree import pytree
from tq_jax.codebook import lloyd_max
from tq_jax.commands.rivals.roundings import (
    RIVALS,
    Calibrated,
    Rival,
    Tokens,
    TurboQuant,
    hadamard_matrix,
    half,
    min_max,
)

Heads = Array | np.ndarray
"""Queries, keys or values of all layers."""

MOST = 8
"""Most bits of a channel."""

LEAST_DIM = 3
"""Least dimensions for which there is a codebook of unit vectors; pairs take it too."""

CLIPS = tuple(np.linspace(0.5, 1.0, 11).round(2).tolist())
"""Shares of a token's range that a calibration tries."""


@pytree
class Blocks:
    """A calibration of `BlockBits`, of one layer or with a first axis of layers.

    Attributes:
        forward: Orthogonal matrix of each head, which turns channels of equal bits into each other.
        widths: Bits of each channel, int32.
        tables: Positive centroids by bits, infinite where there are fewer.
    """

    forward: Float[Array, "*layers h d d"]
    widths: Array
    tables: Float[Array, "*layers h bits c"]


@dataclasses.dataclass(frozen=True)
class BlockBits:
    """Keys of Block-GTQ (arXiv 2606.24033): bits by the energy of the pairs of channels that RoPE turns together.

    The energy of a pair is the product of the mean squares of queries and keys. Bits go to the pair that gains most, by
    the law 4^-b, until their mean is reached. Channels of equal bits are TurboQuant's unit vectors, with a norm each;
    all norms but one are left out of the stored bits, in the rival's favour.

    Attributes:
        bits: Mean of the bits per code.
    """

    bits: int

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number; see `Calibrated`."""
        return self.bits + 16 / dim

    def fit(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> Blocks:
        """Bits and rotations; see `Calibrated`."""
        energy = _pair_squares(query) * _pair_squares(key)
        pairs = allot(energy, self.bits)
        widths = np.concatenate([pairs, pairs], axis=-1)
        forward = np.zeros((*widths.shape, widths.shape[-1]), np.float32)
        tables = np.full((*widths.shape[:2], MOST + 1, 2 ** (MOST - 1)), np.inf, np.float32)
        rng = np.random.default_rng(0)
        for place in np.ndindex(widths.shape[:2]):
            for bits in np.unique(widths[place]):
                channels = np.flatnonzero(widths[place] == bits)
                turned, _ = np.linalg.qr(rng.normal(size=(channels.size, channels.size)))
                forward[place][np.ix_(channels, channels)] = turned
                if bits:
                    tables[place][bits, : 2 ** (bits - 1)] = _centroids(max(channels.size, LEAST_DIM), int(bits))
        return Blocks(jnp.asarray(forward), jnp.asarray(widths, jnp.int32), jnp.asarray(tables))

    def read(self, x: Tokens, fitted: Blocks) -> Tokens:
        """The numbers as they are read back; see `Calibrated`."""
        turned = jnp.einsum("hij,bthj->bthi", fitted.forward, x, precision="highest")
        found = jnp.zeros_like(turned)
        for bits in range(1, MOST + 1):
            here = fitted.widths == bits
            norm = jnp.linalg.norm(jnp.where(here, turned, 0.0), axis=-1, keepdims=True)
            table = fitted.tables[:, bits, : 2 ** (bits - 1)]
            coded = _nearest(turned / jnp.maximum(norm, 1e-20), table) * half(norm)
            found = jnp.where(here, coded, found)
        return jnp.einsum("hij,bthi->bthj", fitted.forward, found, precision="highest")


def _pair_squares(x: np.ndarray) -> np.ndarray:
    """Mean square of the pairs of channels that a rotary embedding turns, [layers, h_kv, d / 2]."""
    squares = np.mean(np.square(x, dtype=np.float64), axis=2)
    return squares.reshape(*squares.shape[:2], 2, -1).sum(2)


def allot(energy: np.ndarray, mean: int) -> np.ndarray:
    """Bits for each of some parts, greedily by the gain of one more bit.

    Args:
        energy: Squared error of each part without any bit, [..., parts].
        mean: Mean of the bits.

    Example:
        >>> allot(np.array([[64.0, 1.0, 1.0, 1.0]]), 2).tolist()
        [[5, 1, 1, 1]]
    """
    bits = np.zeros(energy.shape, np.int32)
    for _ in range(mean * energy.shape[-1]):
        gain = np.where(bits < MOST, energy * 4.0**-bits, -1.0)
        best = np.argmax(gain, axis=-1)[..., None]
        np.put_along_axis(bits, best, np.take_along_axis(bits, best, -1) + 1, -1)
    return bits


@functools.cache
def _centroids(dim: int, bits: int) -> np.ndarray:
    return lloyd_max(dim, bits)


def _nearest(x: Float[Array, "b t h d"], table: Float[Array, "h c"]) -> Float[Array, "b t h d"]:
    """The nearest of each head's centroids and their negatives."""
    middles = (table[:, 1:] + table[:, :-1]) / 2

    def of_head(x: Array, middles: Array, table: Array) -> Array:
        return table[jnp.searchsorted(middles, jnp.abs(x))]

    found = jax.vmap(of_head, in_axes=(2, 0, 0), out_axes=2)(x, middles, table)
    return jnp.sign(x) * jnp.where(jnp.isfinite(found), found, 0.0)


@pytree
class Rotation:
    """A calibration of `Spectral`, of one layer or with a first axis of layers.

    Attributes:
        forward: Orthogonal matrix of each head.
        clip: Share of a token's range that has codes.
    """

    forward: Float[Array, "*layers h d d"]
    clip: Float[Array, "*layers h"]


@dataclasses.dataclass(frozen=True)
class Spectral:
    """Keys or values of OSCAR (arXiv 2605.17757), with a rotation per head.

    The rotation goes to the eigenvectors of the covariance that attention sees, and from there by a Hadamard matrix, so
    that every coordinate matters alike: for keys the covariance of queries; for values that of values weighted by the
    squared logits of their keys. Codes are uniform in a clipped range of each token, with a float16 scale and minimum.
    The permutation behind the Hadamard matrix changes nothing with one group per head, and is left out.

    Attributes:
        bits: Bits per code.
        part: What is rotated.
    """

    bits: int
    part: Literal["key", "value"]

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number; see `Calibrated`."""
        return self.bits + 32 / dim

    def fit(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> Rotation:
        """Rotations and clips; see `Calibrated`."""
        covariance = _covariance(query, None)
        tokens = key
        if self.part == "value":
            squared = np.einsum("lhti,lhij,lhtj->lht", key, covariance, key, optimize=True)
            covariance, tokens = _covariance(value, squared), value
        _, vectors = np.linalg.eigh(covariance)
        forward = np.einsum("ij,lhkj->lhik", hadamard_matrix(key.shape[-1]), vectors).astype(np.float32)
        turned = jnp.einsum("lhij,lhtj->lhti", forward, tokens, precision="highest")
        errors = [jnp.mean((self._coded(turned, clip) - turned) ** 2, axis=(2, 3)) for clip in CLIPS]
        clip = jnp.asarray(CLIPS, jnp.float32)[jnp.argmin(jnp.stack(errors), axis=0)]
        return Rotation(jnp.asarray(forward), clip)

    def read(self, x: Tokens, fitted: Rotation) -> Tokens:
        """The numbers as they are read back; see `Calibrated`."""
        turned = jnp.einsum("hij,bthj->bthi", fitted.forward, x, precision="highest")
        coded = self._coded(turned, fitted.clip[None, None, :, None])
        return jnp.einsum("hij,bthi->bthj", fitted.forward, coded, precision="highest")

    def _coded(self, x: Array, clip: Array | float) -> Array:
        low, high = (f(x, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
        kept = jnp.clip(x, low * clip, high * clip)
        return min_max(kept, jnp.ones_like(kept, bool), self.bits, axis=x.ndim - 1)


def _covariance(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    x = np.asarray(x, np.float64)
    weighted = x if weights is None else x * weights[..., None]
    return np.einsum("lhti,lhtj->lhij", weighted, x, optimize=True) / x.shape[2]


def fit(rival: Rival, query: Heads, key: Heads, value: Heads, count: int) -> tuple[Any, Any]:
    """Calibrates a rival's keys and values on the first tokens of a text; nothing for parts that need none.

    Args:
        rival: The rival.
        query: Queries of all layers, [layers, t, h_q, d].
        key: Keys, [layers, t, h_kv, d].
        value: Values, [layers, t, h_kv, d].
        count: Number of tokens.
    """
    parts = rival.key, rival.value
    if not any(isinstance(part, Calibrated) for part in parts):
        return (), ()
    heads = [np.asarray(x[:, :count], np.float32) for x in (query, key, value)]
    layers, _, groups, dim = heads[1].shape
    grouped = [x.reshape(layers, count, groups, -1, dim).transpose(0, 2, 1, 3, 4) for x in heads]
    arrays = [x.reshape(layers, groups, -1, dim) for x in grouped]
    found = [part.fit(*arrays) if isinstance(part, Calibrated) else () for part in parts]
    return found[0], found[1]


def block_gtq(bits: int) -> Rival:
    """Block-GTQ; its values are TurboQuant's."""
    return Rival("block_gtq", f"Block-GTQ {bits}", BlockBits(bits), TurboQuant(bits, seed=1))


def oscar(bits: int) -> Rival:
    """OSCAR with a rotation per head."""
    return Rival("oscar", f"OSCAR {bits}", Spectral(bits, "key"), Spectral(bits, "value"))


CALIBRATED = (*(block_gtq(bits) for bits in (4, 3, 2)), *(oscar(bits) for bits in (4, 3, 2)))
EVERY = RIVALS + CALIBRATED
"""The baselines of `tq-jax eval`."""


def compiled_with(rival: Rival) -> tuple[Rival, ...]:
    """The rivals that one compiled function serves together with a rival: all built-in ones without a calibration."""
    return RIVALS if rival in RIVALS else (rival,)
