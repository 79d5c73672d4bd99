import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.encode import encode
from pallas_kernels.encode.reference import COARSE, FINE, SEARCH_MULTIPLES
from pallas_kernels.format import Codebook, CodebookFormat, GroupFormat
from pallas_kernels.lookup import decode, integers
from pallas_kernels.packing import unpack
from tq_jax.codebook import codebook


def vectors(count=64, dim=64, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def brute_codes(y, book, multiple=1.0):
    """Nearest of all centroids, as indices into the ascending list."""
    unit = y / np.linalg.norm(y) / multiple
    return np.argmin(np.abs(unit[:, None] - book.centroids[None]), axis=1)


def test_codes_are_sign_and_magnitude():
    book = codebook(64, 3)
    codes = jnp.arange(8, dtype=jnp.uint8)
    m = np.asarray(integers(codes, book))
    np.testing.assert_array_equal(m[:4], book.levels)
    np.testing.assert_array_equal(m[4:], ~m[:4])
    np.testing.assert_allclose(np.sort((m + 0.5) * np.float32(book.step)), book.centroids, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8])
def test_nearest_centroids(bits):
    book, x = codebook(64, bits), vectors()
    code = encode(jnp.asarray(x), CodebookFormat((book,), scale_dtype="float32"), scale="norm")
    found = decode(code, CodebookFormat((book,))) / jnp.linalg.norm(x, axis=-1, keepdims=True)
    want = np.stack([book.centroids[brute_codes(row, book)] for row in x])
    # A coordinate on a boundary may round either way.
    assert np.mean(np.abs(np.asarray(found) - want) > 1e-6) < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_finds_the_best_multiple(bits):
    """As good as the best of its coarse multiples and of the neighbours of that one."""
    book, x = codebook(64, bits), vectors(16)
    fmt = CodebookFormat((book,), scale_dtype="float32")
    found = np.asarray(decode(encode(jnp.asarray(x), fmt, scale="least_squares", search=True), fmt))
    for row, got in zip(x, found, strict=True):

        def error(place, row=row):
            q = book.centroids[brute_codes(row, book, SEARCH_MULTIPLES[place])]
            return np.sum((row - q * (row @ q) / (q @ q)) ** 2)

        best = min(COARSE, key=error)
        near = [error(best + i) for i in FINE if 0 <= best + i < len(SEARCH_MULTIPLES)]
        assert np.sum((row - got) ** 2) <= min(error(best), *near) * (1 + 1e-4)


def test_search_is_as_good_as_trying_every_multiple():
    book, x = codebook(128, 4), vectors(2000, 128)
    fmt = CodebookFormat((book,), scale_dtype="float32")
    found = np.asarray(decode(encode(jnp.asarray(x), fmt, scale="least_squares", search=True), fmt))
    best = np.full(len(x), np.inf)
    steps = np.abs(x) / np.linalg.norm(x, axis=-1, keepdims=True) / book.step
    for multiple in np.linspace(0.7, 1.3, 31):
        q = np.asarray(book.levels)[np.searchsorted(book.thresholds, steps / multiple)] + 0.5
        best = np.minimum(best, 1 - np.sum(steps * q, -1) ** 2 / np.sum(q * q, -1) * book.step**2)
    error = np.sum((x - found) ** 2, -1) / np.sum(x * x, -1)
    assert np.mean(error) <= np.mean(best) * 1.0005


def test_scale_rules():
    book, x = codebook(64, 4), vectors(8)
    fmt = CodebookFormat((book,), scale_dtype="float32")
    q = np.stack([book.centroids[brute_codes(row, book)] for row in x])
    norm, along, q2 = np.sum(x * x, -1), np.sum(x * q, -1), np.sum(q * q, -1)
    want = {"norm": norm**0.5, "matched": (norm / q2) ** 0.5, "least_squares": along / q2, "unbiased": norm / along}
    for rule, expected in want.items():
        np.testing.assert_allclose(encode(jnp.asarray(x), fmt, scale=rule).scale, expected, rtol=1e-5)


def test_zero_tiny_and_huge_vectors():
    book = codebook(64, 4)
    fmt = CodebookFormat((book,), scale_dtype="float32")
    x = np.concatenate([vectors(1) * 0, vectors(1) * 1e-15, vectors(1) * 1e15])
    for rule in ("norm", "matched", "least_squares", "unbiased"):
        found = np.asarray(decode(encode(jnp.asarray(x), fmt, scale=rule), fmt))
        assert np.all(found[0] == 0), rule
        for row, got in zip(x[1:], found[1:], strict=True):
            assert np.linalg.norm(row / np.linalg.norm(row) - got / np.linalg.norm(row)) < 0.15, rule


def test_not_finite_never_becomes_finite():
    fmt = CodebookFormat((codebook(64, 4),))
    x = vectors(3)
    x[1, 5], x[2, 7] = np.nan, np.inf
    scale = np.asarray(encode(jnp.asarray(x), fmt, scale="unbiased", search=True).scale)
    assert np.isfinite(scale).tolist() == [True, False, False]


def test_groups():
    fmt = GroupFormat(64, 4, 16, scale_dtype="float32")
    x = vectors(8)
    code = encode(jnp.asarray(x), fmt)
    codes = np.asarray(unpack(code.packed, 4, 64)).reshape(8, 4, 16)
    assert codes.min(-1).tolist() == [[0] * 4] * 8
    assert codes.max(-1).tolist() == [[15] * 4] * 8
    gap = np.repeat(np.asarray(code.scale), 16, axis=-1)
    assert np.all(np.abs(np.asarray(decode(code, fmt)) - x) <= gap * 0.5001)
    constant = encode(jnp.full((1, 64), 3.25), fmt)
    np.testing.assert_array_equal(decode(constant, fmt), np.full((1, 64), 3.25))


def test_bytes_are_counted():
    fmt = CodebookFormat((codebook(16, 3), codebook(48, 2)), scale_dtype="float16")
    code = encode(jnp.asarray(vectors(10)), fmt)
    assert code.nbytes == 10 * fmt.bytes_per_vector == 10 * (6 + 12 + 4)
    assert Codebook(dim=8, bits=0, levels=(0,), step=0.0).centroids.tolist() == [0.0]


def test_the_same_twice_and_under_transformations():
    fmt, x = CodebookFormat((codebook(64, 4),)), jnp.asarray(vectors(12))

    def run(x):
        return encode(x, fmt, scale="unbiased", search=True)

    first = jax.jit(run)(x)
    for other in (jax.jit(run)(x), jax.jit(jax.vmap(run))(x), jax.lax.map(run, x)):
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_errors():
    fmt = CodebookFormat((codebook(64, 4),))
    with pytest.raises(ValueError, match=r"expected vectors of 64 channels, got shape \(3, 32\)"):
        encode(jnp.zeros((3, 32)), fmt)
    with pytest.raises(ValueError, match="expected a sketch exactly for formats with a residual, got sketch=True"):
        encode(jnp.zeros((3, 64)), fmt, sketch=jnp.zeros((64, 64)))
    with pytest.raises(NotImplementedError, match="implementation='cuda'; encode has: 'reference'"):
        encode(jnp.zeros((3, 64)), fmt, implementation="cuda")
