"""The meaning of the bytes of one quantized vector: static formats, and the arrays that they describe."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import packed_bytes
from pallas_kernels.pytree import pytree

ScaleRule = Literal["norm", "matched", "least_squares", "unbiased"]
ScaleDtype = Literal["float16", "float32"]


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A symmetric scalar codebook of half-integers times a step, for coordinates of unit vectors of `dim` dimensions.

    A code is sign and magnitude: its top bit is the sign, the other bits are an index i into `levels`. Its centroid is
    (m + 1/2) * step with m = levels[i] for a positive and m = ~levels[i] = -levels[i] - 1 for a negative sign, so that
    negation is bitwise NOT. At 8 bits the stored byte is m itself (two's complement) and the grid is uniform.

    Attributes:
        dim: Dimensions of the unit vectors that the codebook is made for.
        bits: Bits per code; 0 is the empty codebook, whose only centroid is zero.
        levels: The 2**(bits-1) non-negative integers m, ascending, each at most 127.
        step: Width of one integer step, in units of the unit vector.
    """

    dim: int
    bits: int
    levels: tuple[int, ...]
    step: float

    @property
    def centroids(self) -> np.ndarray:
        """All 2**bits centroids, ascending, float32 [2**bits] (a single zero for 0 bits)."""
        if self.bits == 0:
            return np.zeros(1, np.float32)
        positive = (np.asarray(self.levels, np.float64) + 0.5) * self.step
        return np.concatenate([-positive[::-1], positive]).astype(np.float32)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Decision boundaries between the positive centroids, in steps."""
        return tuple((a + b + 1) / 2 for a, b in zip(self.levels[:-1], self.levels[1:], strict=True))


@dataclasses.dataclass(frozen=True)
class CodebookFormat:
    """Vectors as codebook indices and one scale per segment, with or without the signs of a sketch of the residual.

    Attributes:
        segments: Codebooks of consecutive runs of rotated channels: one, or two for a fractional width.
        residual: Whether the signs of S r and the norm of the residual r are stored, too (TurboQuant Prod).
        scale_dtype: Type of the stored scalars.
    """

    segments: tuple[Codebook, ...]
    residual: bool = False
    scale_dtype: ScaleDtype = "float16"

    @property
    def dim(self) -> int:
        """Channels per vector."""
        return sum(segment.dim for segment in self.segments)

    @property
    def num_scales(self) -> int:
        """Stored scales per vector, without the norm of the residual."""
        return len(self.segments)

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed codes per vector."""
        return sum(packed_bytes(segment.dim, segment.bits) for segment in self.segments)

    @property
    def bytes_per_vector(self) -> int:
        """All stored bytes per vector."""
        scalars = self.num_scales + self.residual
        signs = packed_bytes(self.dim, 1) if self.residual else 0
        return self.packed_bytes + signs + scalars * np.dtype(self.scale_dtype).itemsize


@dataclasses.dataclass(frozen=True)
class GroupFormat:
    """Vectors as unsigned min-max codes, with a scale and a zero per group of channels; not rotated.

    Attributes:
        dim: Channels per vector.
        bits: Bits per code.
        group: Channels that share a scale and a zero; divides dim.
        scale_dtype: Type of the stored scalars.
    """

    dim: int
    bits: int
    group: int
    scale_dtype: ScaleDtype = "float16"

    @property
    def num_scales(self) -> int:
        """Groups per vector."""
        return self.dim // self.group

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed codes per vector."""
        return packed_bytes(self.dim, self.bits)

    @property
    def bytes_per_vector(self) -> int:
        """All stored bytes per vector."""
        return self.packed_bytes + 2 * self.num_scales * np.dtype(self.scale_dtype).itemsize


VectorFormat = CodebookFormat | GroupFormat


@pytree
class Code:
    """The stored arrays of a batch of quantized vectors; a pytree.

    Invariants: `packed` is uint8 and its last axis is `format.packed_bytes`; the scalars have the format's scale_dtype;
    batch axes agree. If a format has several scales per vector, they are the last axis of `scale` (and `zero`). Cache
    pages hold the same arrays in another layout, see `pallas_kernels.pages`.

    Attributes:
        packed: uint8 [*batch, bytes], see `pallas_kernels.packing`.
        scale: [*batch], or [*batch, num_scales] for fractional widths and groups.
        zero: [*batch, num_scales], the minimum of each group; None unless the format is a GroupFormat.
        signs: uint8 [*batch, ceil(dim/8)], packed signs of the sketched residual (1 is negative); None unless the
            format has a residual.
        residual: [*batch], the norm of the residual; None unless the format has a residual.
    """

    packed: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    signs: jax.Array | None = None
    residual: jax.Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, scales included."""
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))
