"""Quantizers of other projects, as functions that round numbers: baselines for evaluation, not for serving.

Each quantizer rounds keys or values [b, t, h, d] as its own implementation stores and reads them, with scales and zeros
in the same types, and says how many bits per number it stores, scales and zeros included. Tokens that `valid` marks as
missing have no effect.
"""

import dataclasses
import functools
import itertools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy import linalg

from tq_jax.codebook import lloyd_max
from tq_jax.quantizer import Kind, QuantizerSpec, dequantize, make_quantizer, quantize
from tq_jax.rotation import random_rotation, rotate, unrotate

Tokens = Float[Array, "b t h d"]
GAUSSIAN_DIM = 1 << 20
"""Dimensions at which the coordinates of a unit vector are practically normal."""


@runtime_checkable
class Rounding(Protocol):
    """A quantizer of keys or values; static and hashable."""

    @property
    def bits(self) -> float:
        """Bits per code."""
        ...

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number, scales and zeros included, of heads of dim channels."""
        ...

    def __call__(self, x: Tokens, valid: Bool[Array, "t"]) -> Tokens:
        """The numbers as they are read back, float32."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A quantizer of keys or values that is calibrated first; static and hashable."""

    @property
    def bits(self) -> float:
        """Bits per code."""
        ...

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number, scales and zeros included, of heads of dim channels."""
        ...

    def fit(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> Any:
        """Arrays whose first axis is the layer, from heads [layers, h_kv, tokens, d], g queries per token and head."""
        ...

    def read(self, x: Tokens, fitted: Any) -> Tokens:
        """The numbers as they are read back, float32, by the arrays of one layer."""
        ...


@dataclasses.dataclass(frozen=True)
class TurboQuant:
    """TurboQuant as published (arXiv 2504.19874): a dense random rotation, the norm, and for "prod" a sketch.

    Attributes:
        bits: Bits per code; for "prod" one of them belongs to the sketch.
        kind: "mse" or "prod".
        seed: Seed of the rotation.
    """

    bits: float
    kind: Kind = "mse"
    seed: int = 0

    def spec(self, dim: int) -> QuantizerSpec:
        """The quantizer."""
        return QuantizerSpec(dim=dim, bits=self.bits, kind=self.kind, rotation="haar", scale="norm")

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number; see `Rounding`."""
        return self.spec(dim).bytes_per_vector * 8 / dim

    def __call__(self, x: Tokens, valid: Bool[Array, "t"]) -> Tokens:
        """The numbers as they are read back; see `Rounding`."""
        quantizer = make_quantizer(self.spec(x.shape[-1]), seed=self.seed)
        return dequantize(quantizer, quantize(quantizer, x))


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """KIVI's keys (arXiv 2402.02750): min-max codes of each channel over groups of tokens, float16 scale and minimum.

    The range of a group that is not full is the range of the tokens that it holds.

    Attributes:
        bits: Bits per code.
        group: Tokens per group.
    """

    bits: int
    group: int

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number; see `Rounding`."""
        return self.bits + 32 / self.group

    def __call__(self, x: Tokens, valid: Bool[Array, "t"]) -> Tokens:
        """The numbers as they are read back; see `Rounding`."""
        b, t, h, d = x.shape
        pad = -t % self.group
        grouped = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, -1, self.group, h, d)
        exists = jnp.pad(valid, (0, pad)).reshape(1, -1, self.group, 1, 1)
        return min_max(grouped, exists, self.bits, axis=2).reshape(b, t + pad, h, d)[:, :t]


@dataclasses.dataclass(frozen=True)
class PerToken:
    """KIVI's values: min-max codes of each token over groups of channels, float16 scale and minimum.

    Attributes:
        bits: Bits per code.
        group: Channels per group; groups larger than a head are cut to the head, whose channels they must divide.
    """

    bits: int
    group: int

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number; see `Rounding`."""
        return self.bits + 32 / min(self.group, dim)

    def __call__(self, x: Tokens, valid: Bool[Array, "t"]) -> Tokens:
        """The numbers as they are read back; see `Rounding`."""
        grouped = x.reshape(*x.shape[:3], -1, min(self.group, x.shape[3]))
        return min_max(grouped, jnp.ones((1,) * 5, bool), self.bits, axis=4).reshape(x.shape)


def min_max(x: Float[Array, "..."], exists: Bool[Array, "..."], bits: int, *, axis: int) -> Float[Array, "..."]:
    """Rounds to 2**bits levels between the minimum and the maximum of each group along an axis.

    Example:
        >>> x = jnp.array([0.0, 1.0, 2.4, 3.0])
        >>> min_max(x, jnp.ones(4, bool), 2, axis=0).tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    low = jnp.min(jnp.where(exists, x, jnp.inf), axis=axis, keepdims=True)
    high = jnp.max(jnp.where(exists, x, -jnp.inf), axis=axis, keepdims=True)
    empty = ~jnp.any(exists, axis=axis, keepdims=True)
    low, high = jnp.where(empty, 0.0, low), jnp.where(empty, 0.0, high)
    top = 2**bits - 1
    scale, zero = half((high - low) / top), half(low)
    codes = jnp.clip(jnp.round((x - zero) / jnp.where(scale > 0, scale, 1.0)), 0, top)
    return codes * scale + zero


@dataclasses.dataclass(frozen=True)
class VllmKeys:
    """Keys of vLLM's turboquant presets: plain Hadamard transform, Lloyd-Max codes for normal coordinates, the norm.

    Attributes:
        bits: Bits per code.
        norm_correction: Whether the vector of centroids is normalized to 1 when it is read.
    """

    bits: int
    norm_correction: bool = True

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number; see `Rounding`."""
        return (-(-dim * self.bits // 8) + 2) * 8 / dim

    def __call__(self, x: Tokens, valid: Bool[Array, "t"]) -> Tokens:
        """The numbers as they are read back; see `Rounding`."""
        dim = x.shape[-1]
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        y = hadamard(x / (norm + 1e-8))
        centroids = _normal_centroids(self.bits) / dim**0.5
        coded = jnp.full(x.shape, centroids[0], jnp.float32)
        for low, high in itertools.pairwise(centroids):
            coded = coded + jnp.where(y >= np.float32((low + high) / 2), np.float32(high - low), np.float32(0))
        if self.norm_correction:
            coded = coded / jnp.sqrt(jnp.sum(coded * coded, axis=-1, keepdims=True) + 1e-16)
        return hadamard(coded) * half(norm)


@dataclasses.dataclass(frozen=True)
class VllmValues:
    """Values of vLLM's turboquant presets: uniform codes from minimum to maximum of a head, float16 scale and minimum.

    Attributes:
        bits: Bits per code.
    """

    bits: int

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number; see `Rounding`."""
        return (-(-dim * self.bits // 8) + 4) * 8 / dim

    def __call__(self, x: Tokens, valid: Bool[Array, "t"]) -> Tokens:
        """The numbers as they are read back; see `Rounding`."""
        top = 2**self.bits - 1
        low, high = (f(x, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
        scale = jnp.maximum((high - low) / top, 1e-8)
        codes = jnp.clip(jnp.floor((x - low) / scale + 0.5), 0, top)
        return codes * half(scale) + half(low)


@dataclasses.dataclass(frozen=True)
class Int4:
    """vLLM's int4 per token and head: randomized Hadamard transform, codes with an integer zero, float32 scale.

    The zero is stored in the last four bits of the scale's mantissa.
    """

    bits: int = 4

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number; see `Rounding`."""
        return self.bits + 32 / dim

    def __call__(self, x: Tokens, valid: Bool[Array, "t"]) -> Tokens:
        """The numbers as they are read back; see `Rounding`."""
        rotation = random_rotation("hadamard", x.shape[-1], (0, 0))
        y = rotate(rotation, x)
        low, high = (f(y, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
        scale = jnp.maximum((high - low) / 15, 1e-6)
        zero = jnp.clip(jnp.round(-low / scale), 0, 15)
        codes = jnp.clip(jnp.round(y / scale + zero), 0, 15)
        kept = jax.lax.bitcast_convert_type(scale, jnp.int32) & -16
        stored = jax.lax.bitcast_convert_type(kept | zero.astype(jnp.int32), jnp.float32)
        return unrotate(rotation, (codes - zero) * stored)


@dataclasses.dataclass(frozen=True)
class Float8:
    """float8 e4m3 without a scale, saturating."""

    bits: int = 8

    def stored_bits(self, dim: int) -> float:
        """Stored bits per number; see `Rounding`."""
        return float(self.bits)

    def __call__(self, x: Tokens, valid: Bool[Array, "t"]) -> Tokens:
        """The numbers as they are read back; see `Rounding`."""
        top = float(jnp.finfo(jnp.float8_e4m3fn).max)
        return jnp.clip(x, -top, top).astype(jnp.float8_e4m3fn).astype(jnp.float32)


def half(x: Array) -> Array:
    """Numbers as float16 stores them, float32."""
    return x.astype(jnp.float16).astype(jnp.float32)


def hadamard_matrix(dim: int) -> np.ndarray:
    """The orthogonal Hadamard matrix, float32 [dim, dim].

    Raises:
        NotImplementedError: If dim is no power of two.
    """
    if dim & (dim - 1):
        raise NotImplementedError(f"a plain Hadamard transform has a power of two channels, got {dim}")
    return linalg.hadamard(dim).astype(np.float32) / np.float32(dim**0.5)


def hadamard(x: Tokens) -> Tokens:
    """The plain Hadamard transform of heads; see `hadamard_matrix`."""
    return jnp.einsum("...i,ij->...j", x, hadamard_matrix(x.shape[-1]), precision="highest")


@functools.cache
def _normal_centroids(bits: int) -> np.ndarray:
    """Lloyd-Max centroids of the standard normal distribution, ascending."""
    positive = lloyd_max(GAUSSIAN_DIM, bits) * GAUSSIAN_DIM**0.5
    return np.concatenate([-positive[::-1], positive])


@dataclasses.dataclass(frozen=True)
class Rival:
    """Another project's way to store keys and values.

    Attributes:
        name: Name of the method, e.g. "kivi".
        label: Short name for tables.
        key: How keys are rounded.
        value: How values are rounded.
        exact_layers: Number of first layers, and of last layers, that are not quantized.
    """

    name: str
    label: str
    key: Rounding | Calibrated
    value: Rounding | Calibrated
    exact_layers: int = 0

    def stored_bits(self, dim: int, layers: int) -> float:
        """Stored bits per number of compressed tokens, the mean over keys, values and layers."""
        exact = min(2 * self.exact_layers, layers)
        coded = (self.key.stored_bits(dim) + self.value.stored_bits(dim)) / 2
        return (16 * exact + coded * (layers - exact)) / layers


def turboquant(bits: int, kind: Kind = "mse") -> Rival:
    """TurboQuant as published; values are "mse" for both kinds of keys, because the paper does not specify them."""
    name = "turboquant" if kind == "mse" else f"turboquant_{kind}"
    return Rival(name, f"TurboQuant {kind} {bits}", TurboQuant(bits, kind), TurboQuant(bits, seed=1))


def kivi(bits: int, group: int) -> Rival:
    """KIVI with groups of `group` tokens for keys and of `group` channels for values."""
    return Rival("kivi", f"KIVI {bits}, groups of {group}", PerChannel(bits, group), PerToken(bits, group))


def vllm(preset: str) -> Rival:
    """A turboquant preset of vLLM, which does not quantize the first two and the last two layers."""
    key, value = _PRESETS[preset]
    rounding = Float8() if key == 8 else VllmKeys(key)
    return Rival(f"vllm_{preset}", f"vLLM {preset}", rounding, VllmValues(value), exact_layers=2)


_PRESETS = {"k8v4": (8, 4), "4bit_nc": (4, 4), "k3v4_nc": (3, 4), "3bit_nc": (3, 3)}

RIVALS = (
    *(turboquant(bits) for bits in (4, 3, 2)),
    *(turboquant(bits, "prod") for bits in (4, 3)),
    *(kivi(bits, group) for group in (32, 128) for bits in (4, 3, 2)),
    *(vllm(preset) for preset in _PRESETS),
    Rival("int4", "int4, Hadamard", Int4(), Int4()),
    Rival("fp8", "fp8 e4m3", Float8(), Float8()),
)
"""Baselines that need no calibration."""
