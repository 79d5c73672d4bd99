"""The static specification of an index, and the layout of its packed codes."""

import dataclasses
import math
from typing import Literal, get_args

from pallas_kernels.format import Codebook
from pallas_kernels.packing import packed_bytes, plane_widths
from tq_jax.codebook import codebook, solve
from tq_jax.plain import flag, make_plain, number, whole
from tq_jax.quantizer import require_choices, require_dim

Metric = Literal["inner_product", "cosine", "l2"]
Basis = Literal["pca", "random"]
Kind = Literal["mse", "prod"]
Scale = Literal["unbiased", "norm"]
MIN_DIM, MAX_DIM = 16, 4096
SCALAR_BYTES = 2
"""Stored scalars are float16, in units of the index."""


@dataclasses.dataclass(frozen=True)
class IndexSpec:
    """The choices that make an index; static and hashable.

    Attributes:
        dim: Dimensions of a vector, 16 to 4096.
        bits: Mean bits per coordinate, 1 to 8; fractions with basis "pca" only.
        metric: The score of a vector x for a query q: "inner_product" <q, x>; "cosine", the same of vectors and queries
            divided by their norms; or "l2", the negative squared distance. Larger is nearer.
        basis: "random" rotates all channels together and gives all of them the same bits (arXiv 2504.19874); only the
            mean comes from data. "pca" first rotates to principal components, gives components of large variance more
            bits and the others fewer, and rotates within runs of equal bits.
        kind: "mse" (Algorithm 1) or "prod" (Algorithm 2; basis "random" and scale "norm" only).
        scale: Scalar stored per vector: "unbiased" makes the estimate of <x, x> exact, "norm" is the published one.
        center: Whether the mean is subtracted from vectors before they are quantized. Inner products with the mean are
            then stored apart, as second scalars.
        step_search: Whether several steps are tried for every vector and the one of least squared error is kept.

    Raises:
        ValueError: For values and combinations that do not exist.
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
        choices = {"metric": Metric, "basis": Basis, "kind": Kind, "scale": Scale}
        require_choices(self, **{name: get_args(choice) for name, choice in choices.items()})
        make_plain(self, dim=whole, bits=number, center=flag, step_search=flag)
        require_dim(self.dim, MIN_DIM, MAX_DIM)
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
        """Whether a second scalar is stored: for "l2" the squared norm, else, if centred, the product with the mean."""
        return self.center or self.metric == "l2"

    @property
    def code_bytes(self) -> int:
        """Most bytes of codes per vector; for basis "random", those of planes of whole bytes."""
        if self.basis == "pca":
            return math.ceil(self.dim * self.bits / 8)
        prod = self.kind == "prod"
        return packed_bytes(self.dim, int(self.bits) - prod) + prod * packed_bytes(self.dim, 1)

    @property
    def budget(self) -> int:
        """Most bytes per vector, scalars included; an index uses at most as many."""
        return self.code_bytes + SCALAR_BYTES * (1 + self.has_offset + (self.kind == "prod"))


Widths = tuple[tuple[int, int], ...]
"""Runs of consecutive rotated channels: the number of channels and the bits of each channel; static."""


def planes(widths: Widths) -> list[tuple[int, list[tuple[int, int]]]]:
    """The layout of packed codes: planes of 8, 4, 2 and 1 bits, each packed by `pallas_kernels.packing`.

    A plane holds the fields of all runs that use its width, one run after the other, so only the last byte of the plane
    is padded, not the last byte of each run.

    Returns:
        The width of each plane, and the runs in it with the shifts of their fields.

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
    """Bytes of packed codes per vector."""
    return sum(packed_bytes(sum(widths[run][0] for run, _ in members), width) for width, members in planes(widths))


def books(widths: Widths, dim: int) -> tuple[Codebook, ...]:
    """The codebook of each run, for coordinates of unit vectors of `dim` dimensions, with a step of 1.

    The true steps come from data and belong to the index (`LearnedBasis.gain`).

    Example:
        >>> [(book.dim, book.bits) for book in books(((8, 3), (56, 2)), 64)]
        [(8, 3), (56, 2)]
    """
    return tuple(dataclasses.replace(solved(dim, bits), dim=count, step=1.0) for count, bits in widths)


def solved(dim: int, bits: int) -> Codebook:
    """The codebook of `bits` bits, 0 to 8, for unit vectors of `dim` dimensions."""
    return solve(dim, bits) if bits == 6 else codebook(dim, bits)
