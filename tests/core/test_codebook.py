import json

import numpy as np
import pytest

from tq_jax import codebook as cb

EXACT = {
    64: (0.35839, 0.11453, 0.03339, 0.00913),
    128: (0.36089, 0.11600, 0.03397, 0.00932),
    256: (0.36214, 0.11674, 0.03426, 0.00941),
}
GAUSSIAN = {1: [0.7979], 2: [0.4528, 1.5104], 3: [0.2451, 0.7560, 1.3439, 2.1519]}


@pytest.mark.parametrize("dim", EXACT)
def test_distortion_is_the_exact_one(dim):
    found = [cb.distortion(cb.codebook(dim, bits)) for bits in (1, 2, 3, 4)]
    np.testing.assert_allclose(found, EXACT[dim], rtol=1.5e-3)


def test_gaussian_limit():
    for bits, centroids in GAUSSIAN.items():
        np.testing.assert_allclose(cb.lloyd_max(100_000, bits) * 100_000**0.5, centroids, atol=2e-4)
    entropies = [cb.index_entropy(cb.solve(100_000, bits)) for bits in (1, 2, 3, 4, 5)]
    np.testing.assert_allclose(entropies, [1, 1.911, 2.825, 3.765, 4.730], atol=4e-3)


@pytest.mark.parametrize("dim", [4, 33, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7])
def test_centroids_are_the_means_of_their_cells(dim, bits):
    centroids = cb.lloyd_max(dim, bits)
    x = np.linspace(0, 1, 2_000_001)
    density = (1 - x**2) ** ((dim - 3) / 2)
    cell = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, x)
    mass = np.bincount(cell, density, len(centroids))
    np.testing.assert_allclose(np.bincount(cell, density * x, len(centroids)) / mass, centroids, rtol=2e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_rounding_to_integers_costs_little(bits):
    exact = cb._distortion(cb.lloyd_max(96, bits), 96)
    assert cb.distortion(cb.codebook(96, bits)) < exact * (1.001 if bits < 5 else 1.006)


def test_shipped_books_are_the_solved_ones():
    for dim, bits in [(4, 3), (64, 4), (96, 2), (128, 7), (192, 8), (512, 5)]:
        shipped, solved = cb.codebook(dim, bits), cb.solve(dim, bits)
        assert shipped.levels == solved.levels
        assert shipped.step == pytest.approx(solved.step, rel=1e-6)


def test_shipped_books_need_no_solver(monkeypatch):
    monkeypatch.setattr(cb, "solve", None)
    for dim in cb.SHIPPED_DIMS:
        for bits in cb.SHIPPED_BITS:
            book = cb.codebook(dim, bits)
            assert len(book.levels) == 2 ** (bits - 1)
            assert all(a < b for a, b in zip(book.levels[:-1], book.levels[1:], strict=True))
            assert book.levels[0] >= 0
            assert book.levels[-1] <= cb.MAX_INTEGER
    assert len(json.loads(cb.importlib.resources.files("tq_jax.data").joinpath("codebooks.json").read_text())) == len(
        cb.SHIPPED_DIMS
    ) * len(cb.SHIPPED_BITS)


def test_other_sizes_are_solved():
    assert cb.distortion(cb.codebook(100, 3)) == pytest.approx(0.0338, abs=2e-4)


def test_errors():
    with pytest.raises(ValueError, match="expected dim of at least 4, got 3"):
        cb.codebook(3, 4)
    with pytest.raises(NotImplementedError, match=r"codebooks have \(1, 2, 3, 4, 5, 7, 8\) bits, got bits=6"):
        cb.codebook(64, 6)
