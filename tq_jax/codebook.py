"""Lloyd-Max codebooks for the coordinates of random unit vectors.

The density of one coordinate of a uniformly random unit vector in d dimensions is proportional to
(1 - x^2)^((d-3)/2) on [-1, 1] (arXiv 2504.19874, section 3.1, Lemma 1). Codebooks for common d and bits ship as data;
scipy solves the others on demand.
"""

import functools
import importlib.resources
import json

import numpy as np
from scipy import optimize, special

from pallas_kernels.format import Codebook

MAX_INTEGER = 127
"""Largest int8 integer of a codebook level."""

SHIPPED_BITS = (1, 2, 3, 4, 5, 7, 8)
SHIPPED_DIMS = (4, 8, 12, 16, 20, 24, 32, 40, 48, 60, 64, 72, 80, 96, 112, 120, 128, 144, 160, 192, 256, 384, 512)
_DATA = "codebooks.json"
"""File of the shipped codebooks, in `tq_jax.data`."""


def codebook(dim: int, bits: int) -> Codebook:
    """The codebook of `bits` bits for the coordinates of unit vectors of `dim` dimensions.

    The exact Lloyd-Max centroids are rounded to half-integers times a step. This costs under 0.1 % of distortion up to
    4 bits (0.5 % at 5) and is the definition that references and kernels share. At 8 bits the grid is uniform.

    Args:
        dim: Dimensions of the vectors, at least 4.
        bits: 0 to 5, 7 or 8 (7 and 0 are for the first stage of kind "prod" at 8 and 1 bits).

    Returns:
        The codebook.

    Raises:
        ValueError: If dim is below 4.
        NotImplementedError: For other widths.

    Example:
        >>> book = codebook(128, 2)
        >>> [round(float(c) * 128**0.5, 2) for c in book.centroids]
        [-1.51, -0.45, 0.45, 1.51]
    """
    if dim < 4:
        raise ValueError(f"expected dim of at least 4, got {dim}")
    if bits == 0:
        return Codebook(dim=dim, bits=0, levels=(0,), step=0.0)
    if bits not in SHIPPED_BITS:
        raise NotImplementedError(f"codebooks have {SHIPPED_BITS} bits, got bits={bits}")
    return _shipped().get((dim, bits)) or solve(dim, bits)


def distortion(book: Codebook) -> float:
    """Expected squared error D_mse of a unit vector that is quantized to nearest centroids with its norm as scale.

    Example:
        >>> round(distortion(codebook(128, 4)), 5)
        0.00932
    """
    centroids = np.asarray(book.levels, np.float64) + 0.5
    return _distortion(centroids * book.step, book.dim)


def index_entropy(book: Codebook) -> float:
    """Entropy of the code of one coordinate, in bits; entropy coding (section 3.1 of the paper) is not done."""
    mass, _ = _moments((np.asarray(book.levels, np.float64) + 0.5) * book.step, book.dim)
    return float(-np.sum(mass * np.log2(mass))) + 1.0


@functools.lru_cache(maxsize=256)
def solve(dim: int, bits: int) -> Codebook:
    """Solves a codebook with scipy, as `codebook` does for sizes that are not shipped."""
    if bits == 8:
        grid = np.arange(MAX_INTEGER + 1) + 0.5
        bound = 16.0 / (dim**0.5 * 2**bits)
        found = optimize.minimize_scalar(lambda step: _distortion(grid * step, dim), bounds=(0.1 * bound, bound))
        return Codebook(dim, bits, tuple(range(MAX_INTEGER + 1)), float(np.float32(found.x)))
    exact = lloyd_max(dim, bits)
    best = None
    for top in range(max(2 ** (bits - 1), 32) - 1, MAX_INTEGER + 1):
        levels = np.rint(exact * ((top + 0.5) / exact[-1]) - 0.5)
        if np.any(np.diff(levels) < 1) or levels[0] < 0:
            continue
        step = _best_step(levels + 0.5, exact[-1] / (top + 0.5), dim)
        error = _distortion((levels + 0.5) * step, dim)
        if best is None or error < best[0]:
            best = error, levels, step
    assert best is not None
    return Codebook(dim, bits, tuple(int(m) for m in best[1]), float(np.float32(best[2])))


def lloyd_max(dim: int, bits: int) -> np.ndarray:
    """Solves for the positive Lloyd-Max centroids of the coordinate density; ascending, float64 [2**(bits-1)]."""
    count = 2 ** (bits - 1)
    centroids = special.ndtri(0.5 + (np.arange(count) + 0.5) / (2 * count)) / dim**0.5
    centroids = np.minimum(centroids, np.linspace(0.5 / count, 1 - 0.5 / count, count))

    def shift(log_gaps: np.ndarray) -> np.ndarray:
        points = np.cumsum(np.exp(log_gaps))
        mass, first = _moments(points, dim)
        return (first / mass - points) * dim**0.5

    for _ in range(50):
        mass, first = _moments(centroids, dim)
        centroids = first / mass
    gaps = np.log(np.diff(centroids, prepend=0.0))
    found = optimize.root(shift, gaps, method="hybr", options={"xtol": 1e-13})
    return np.cumsum(np.exp(found.x))


def _moments(centroids: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Mass and first moment of |x| in the cell of each positive centroid."""
    edges = np.concatenate([[0.0], (centroids[1:] + centroids[:-1]) / 2, [1.0]])
    edges = np.minimum(edges, 1.0)
    cdf = special.betainc(0.5, (dim - 1) / 2, edges**2)
    peak = np.exp(special.gammaln(dim / 2) - special.gammaln((dim - 1) / 2)) / np.pi**0.5
    tail = (1 - edges**2) ** ((dim - 1) / 2) * (2 * peak / (dim - 1))
    return np.maximum(np.diff(cdf), 1e-300), -np.diff(tail)


def _distortion(centroids: np.ndarray, dim: int) -> float:
    """D_mse of the codebook with these positive centroids and their negatives."""
    mass, first = _moments(centroids, dim)
    return float(1 + dim * np.sum(centroids * (centroids * mass - 2 * first)))


def _best_step(halves: np.ndarray, step: float, dim: int) -> float:
    """The step of least distortion for half-integer centroids, by alternating cells and least squares from a step."""
    for _ in range(30):
        mass, first = _moments(halves * step, dim)
        step = float(np.sum(halves * first) / np.sum(halves**2 * mass))
    return step


@functools.cache
def _shipped() -> dict[tuple[int, int], Codebook]:
    """The shipped codebooks by dim and bits."""
    text = importlib.resources.files("tq_jax.data").joinpath(_DATA).read_text("utf-8")
    return {
        (entry["dim"], entry["bits"]): Codebook(entry["dim"], entry["bits"], tuple(entry["levels"]), entry["step"])
        for entry in json.loads(text)
    }


def shipped_text() -> str:
    """The JSON text of the shipped codebooks, solved anew; the data file holds this text."""
    books = [solve(dim, bits) for dim in SHIPPED_DIMS for bits in SHIPPED_BITS]
    rows = [json.dumps({"dim": b.dim, "bits": b.bits, "levels": b.levels, "step": b.step}) for b in books]
    return "[\n" + ",\n".join(rows) + "\n]\n"
