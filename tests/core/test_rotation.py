import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_jax.rotation import gaussian, mixing_matrix, random_rotation, rotate, unrotate


@settings(deadline=None, max_examples=30)
@given(dim=st.integers(16, 512), kind=st.sampled_from(["hadamard", "haar"]), seed=st.integers(0, 2**32))
def test_orthogonal_and_invertible(dim, kind, seed):
    rotation = random_rotation(kind, dim, (seed, 0))
    x = np.random.default_rng(0).standard_normal((3, dim)).astype(np.float32)
    y = rotate(rotation, jnp.asarray(x))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=2e-6)
    np.testing.assert_allclose(unrotate(rotation, y), x, atol=1e-5)


def test_hadamard_is_hadamard():
    matrix = mixing_matrix(64)
    np.testing.assert_array_equal(np.abs(matrix), np.full((64, 64), 0.125, np.float32))
    np.testing.assert_array_equal(matrix, matrix.T)


@pytest.mark.parametrize("dim", [80, 96, 192])
def test_blocks_are_mixed(dim):
    """One coordinate must spread over all of them, or outlier channels stay outliers."""
    spread = np.abs(mixing_matrix(dim)).max(axis=1) * dim**0.5
    assert spread.max() < 1.5


def test_golden_randomness():
    """The same bytes on every platform and version."""
    signs = np.asarray(random_rotation("hadamard", 16, (0, 0)))
    assert "".join("+" if s > 0 else "-" for s in signs) == GOLDEN_SIGNS
    np.testing.assert_allclose(gaussian((4,), (0, 1)), GOLDEN_NORMALS, rtol=1e-12)
    assert not np.array_equal(signs, random_rotation("hadamard", 16, (1, 0)))


def test_haar_columns_are_uniform():
    corner = [float(random_rotation("haar", 16, (seed, 0))[0, 0]) for seed in range(400)]
    assert abs(np.mean(corner)) < 0.05
    assert np.var(corner) == pytest.approx(1 / 16, rel=0.2)


GOLDEN_SIGNS = "+++--+--++-+-+--"
GOLDEN_NORMALS = [0.8903241113278905, 0.6786855090559122, 0.44447124687356104, -0.042314533062357426]
