import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tq_jax.models import Sampling
from tq_jax.models.sampling import sample

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.07, 0.03])


def draw(sampling: Sampling, count: int = 4000) -> np.ndarray:
    """Relative frequencies of drawn tokens. Their order in the vocabulary is not that of their probabilities."""
    order = np.array([3, 0, 4, 1, 2])
    logits = jnp.asarray(np.log(PROBABILITIES), jnp.float32)[order]
    keys = jax.random.split(jax.random.key(0), count)
    tokens = np.asarray(sample(jnp.broadcast_to(logits, (count, 5)), keys, sampling))
    return np.bincount(order[tokens], minlength=5) / count


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), 5),
        (Sampling(temperature=1.0, top_k=2), 2),
        (Sampling(temperature=1.0, top_k=99), 5),
        (Sampling(temperature=1.0, top_p=0.5), 1),
        (Sampling(temperature=1.0, top_p=0.51), 2),
        (Sampling(temperature=1.0, top_p=0.95), 4),
        (Sampling(temperature=1.0, top_p=1.0), 5),
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), 2),
    ],
)
def test_frequencies(sampling, kept):
    expected = np.where(np.arange(5) < kept, PROBABILITIES, 0.0)
    np.testing.assert_allclose(draw(sampling), expected / expected.sum(), atol=0.03)


def test_temperature_sharpens():
    sharp = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    np.testing.assert_allclose(draw(Sampling(temperature=0.5)), sharp, atol=0.03)
    assert draw(Sampling(), count=3)[0] == 1.0


@pytest.mark.parametrize("temperature", [1e-20, 1e-37, 1e-38, 1e-45, 1e-300])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.5}])
def test_the_limit_of_low_temperatures_is_the_most_likely_token(temperature, options):
    logits = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 8)
    for size in (1e-3, 5, 1e6, 1e30):
        found = sample(jnp.asarray(logits * np.float32(size)), keys, Sampling(temperature=temperature, **options))
        assert found.tolist() == logits.argmax(-1).tolist(), size


def test_the_limit_of_high_temperatures_is_uniform():
    np.testing.assert_allclose(draw(Sampling(temperature=1e300)), [0.2] * 5, atol=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "expected a finite number"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"top_k": 5}, "expected more than 0 with top_k or top_p"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
