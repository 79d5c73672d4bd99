import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from tq_jax.commands import measures


@pytest.mark.parametrize("cosine", [0.0, 0.35, 1.0])
def test_correlated_vectors_have_the_cosine_asked_for(cosine):
    x = measures.sphere(0, 33, 48)
    y = measures.correlated(x, cosine, seed=1)
    np.testing.assert_allclose(jnp.sum(x * y, axis=-1), cosine, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), 1.0, atol=1e-5)


def test_distortion_is_relative_to_the_norm():
    x = measures.sphere(0, 256, 64)
    spec = tq.QuantizerSpec(dim=64, bits=3, scale="norm")
    assert measures.distortion(spec, 7.0 * x) == pytest.approx(measures.distortion(spec, x), rel=2e-3)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_recall_counts_sets_and_not_order(k):
    exact = jax.random.normal(jax.random.key(0), (5, 40))
    estimated = jax.random.normal(jax.random.key(1), (5, 40))
    expected = [
        len(set(np.argsort(-a)[:k]) & set(np.argsort(-b)[:k])) / k for a, b in zip(exact, estimated, strict=True)
    ]
    assert measures.recall(exact, estimated, k) == pytest.approx(np.mean(expected))
    assert measures.recall(exact, exact, k) == 1.0


def test_attention_divergence_is_the_mean_kl():
    p, q = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    expected = float(np.sum(p * np.log(p / q)))
    scores = [jnp.log(jnp.asarray(x, jnp.float32))[None] for x in (p, q)]
    assert measures.attention_divergence(*scores) == pytest.approx(expected, abs=1e-6)


def test_keys_with_outliers_have_the_mean_and_spread_they_say():
    mean, std, deviation = measures.keys_with_outliers(3, 2000, 64, mean_norm=300.0)
    assert float(jnp.linalg.norm(mean)) == pytest.approx(300.0, rel=1e-5)
    assert float(jnp.max(jnp.abs(jnp.mean(deviation, axis=0)))) < 5 / math.sqrt(2000)
    assert float(jnp.max(std) / jnp.median(std)) > 4
