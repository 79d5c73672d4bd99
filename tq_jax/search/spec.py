"""What an index does: its static specification."""

import dataclasses
import math
from typing import Literal, get_args

from pallas_kernels.format import Codebook
from pallas_kernels.packing import packed_bytes, plane_widths
from tq_jax.codebook import codebook, solve

Metric = Literal["inner_product", "cosine", "l2"]
Basis = Literal["pca", "random"]
Kind = Literal["mse", "prod"]
Scale = Literal["unbiased", "norm"]
MIN_DIM, MAX_DIM = 16, 4096
SCALAR_BYTES = 2
"""Stored scalars are float16, in units of the index."""


@dataclasses.dataclass(frozen=True)
class IndexSpec:
    """What an index stores and how it compares; static and hashable.

    Attributes:
        dim: Dimensions of a vector, 16 to 4096.
        bits: Mean bits a coordinate, 1 to 8; fractions of them with basis "pca" only.
        metric: What a score is: "inner_product" <q, x>, "cosine" (vectors and queries are divided by their norms), or
            "l2", the negative squared distance. Larger is nearer.
        basis: "random" rotates all channels together and gives each the same bits (arXiv 2504.19874); nothing but the
            mean comes from data. "pca" rotates to principal components first, gives components of large variance more
            bits and small ones fewer, and rotates within runs of equal bits.
        kind: "mse" (Algorithm 1) or "prod" (Algorithm 2; basis "random" and scale "norm" only).
        scale: Scalar stored for a vector: "unbiased" makes the estimate of <x, x> exact, "norm" is the published one.
        center: Quantize vectors less their mean. The term this drops from inner products is stored exactly.
        step_search: Try several steps for every vector and keep that of least squared error.

    Raises:
        ValueError: For values outside the sets above and combinations that do not exist.
        NotImplementedError: For widths and dimensions outside the limits above.

    Example:
        >>> IndexSpec(dim=200, bits=2).budget
        54
    """

    dim: int
    bits: float = 4
    metric: Metric = "inner_product"
    basis: Basis = "pca"
    kind: Kind = "mse"
    scale: Scale = "unbiased"
    center: bool = True
    step_search: bool = True

    def __post_init__(self) -> None:
        choices = (("metric", Metric), ("basis", Basis), ("kind", Kind), ("scale", Scale))
        for name, allowed in choices:
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"expected {name} in {get_args(allowed)}, got {getattr(self, name)!r}")
        if not MIN_DIM <= self.dim <= MAX_DIM:
            raise NotImplementedError(f"dim from {MIN_DIM} to {MAX_DIM} is supported, got dim={self.dim}")
        if not 1 <= self.bits <= 8:
            raise NotImplementedError(f"bits from 1 to 8 are supported, got bits={self.bits!r}")
        if self.basis == "random" and self.bits != int(self.bits):
            raise NotImplementedError(f"basis='random' has whole bits, got bits={self.bits!r}")
        if self.kind == "prod" and (self.basis, self.scale, self.step_search) != ("random", "norm", False):
            raise ValueError(
                "expected basis='random', scale='norm' and step_search=False for kind='prod', got "
                f"basis={self.basis!r}, scale={self.scale!r}, step_search={self.step_search}"
            )
        if self.scale == "norm" and self.step_search:
            raise ValueError("expected step_search=False for scale='norm', which cannot carry the step; got True")

    @property
    def has_offset(self) -> bool:
        """Whether a second scalar is stored: the squared norm for "l2", the product with the mean if centred."""
        return self.center or self.metric == "l2"

    @property
    def code_bytes(self) -> int:
        """Bytes of codes a vector may take, those of basis "random" with planes of whole bytes."""
        if self.basis == "pca":
            return math.ceil(self.dim * self.bits / 8)
        prod = self.kind == "prod"
        return packed_bytes(self.dim, int(self.bits) - prod) + prod * packed_bytes(self.dim, 1)

    @property
    def budget(self) -> int:
        """Bytes a vector may take, scalars included; those of an index are at most this."""
        return self.code_bytes + SCALAR_BYTES * (1 + self.has_offset + (self.kind == "prod"))


Widths = tuple[tuple[int, int], ...]
"""Runs of consecutive rotated channels: how many, and how many bits each; static."""


def planes(widths: Widths) -> list[tuple[int, list[tuple[int, int]]]]:
    """The layout of packed codes: planes of 8, 4, 2 and 1 bits, as `pallas_kernels.packing` packs each.

    Codes are cut into planes as there. A plane holds the fields of all runs that have it, one after the other, so only
    the last byte of a plane is padded, not that of each run.

    Returns:
        Width of each plane, and which runs are in it with the shift of their fields.

    Example:
        >>> planes(((8, 3), (56, 2)))
        [(2, [(0, 0), (1, 0)]), (1, [(0, 2)])]
    """
    found: dict[int, list[tuple[int, int]]] = {8: [], 4: [], 2: [], 1: []}
    for run, (_, bits) in enumerate(widths):
        shift = 0
        for width in plane_widths(bits):
            found[width].append((run, shift))
            shift += width
    return [(width, members) for width, members in found.items() if members]


def widths_bytes(widths: Widths) -> int:
    """Bytes of packed codes a vector."""
    return sum(packed_bytes(sum(widths[run][0] for run, _ in members), width) for width, members in planes(widths))


def books(widths: Widths, dim: int) -> tuple[Codebook, ...]:
    """The codebook of each run, for coordinates of unit vectors of `dim` dimensions, in steps of 1.

    The true steps are data and belong to the index (`Basis.gain`).

    Example:
        >>> [(book.dim, book.bits) for book in books(((8, 3), (56, 2)), 64)]
        [(8, 3), (56, 2)]
    """
    return tuple(dataclasses.replace(solved(dim, bits), dim=count, step=1.0) for count, bits in widths)


def solved(dim: int, bits: int) -> Codebook:
    """The codebook of `bits` bits, 0 to 8."""
    return solve(dim, bits) if bits == 6 else codebook(dim, bits)
