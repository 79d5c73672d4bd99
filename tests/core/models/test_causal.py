import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tq_jax.models import causal_attention


def naive(query, key, value, window=None):
    """Softmax attention with the whole score matrix, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat(group, axis=2), v.repeat(group, axis=2)
    scores = np.einsum("bshd,buhd->bhsu", q, k) / np.sqrt(q.shape[-1])
    visible = np.tril(np.ones(scores.shape[-2:], bool))
    if window is not None:
        visible &= ~np.tril(visible, -window)
    scores = np.where(visible, scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhsu,buhd->bshd", weight / weight.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("tokens", "h_q", "h_kv"), [(1, 6, 2), (8, 3, 3), (9, 6, 2), (37, 6, 2)])
def test_matches_the_softmax(tokens, h_q, h_kv):
    keys = jax.random.split(jax.random.key(tokens), 3)
    query, key, value = (
        3.0 * jax.random.normal(k, (2, tokens, heads, 16)) for k, heads in zip(keys, (h_q, h_kv, h_kv), strict=True)
    )
    out = causal_attention(query, key, value, block=8)
    np.testing.assert_allclose(out, naive(query, key, value), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [1, 5, 8, 17, 100])
def test_a_window(window):
    query, key, value = 3.0 * jax.random.normal(jax.random.key(window), (3, 2, 37, 2, 16))
    out = causal_attention(query, key, value, window=window, block=8)
    np.testing.assert_allclose(out, naive(query, key, value, window), rtol=2e-5, atol=2e-5)


def test_large_logits_do_not_overflow():
    x = 1e3 * jnp.ones((1, 20, 1, 8))
    np.testing.assert_allclose(causal_attention(x, x, x, block=8), x, rtol=1e-6)


def test_what_comes_later_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (1, 20, 2, 8))
    later = x.at[:, 13:].multiply(5.0)
    out, other = (causal_attention(x, y, y, block=8) for y in (x, later))
    np.testing.assert_array_equal(out[:, :13], other[:, :13])
    assert not np.array_equal(out[:, 13:], other[:, 13:])


def test_holds_no_score_matrix():
    tokens, heads = 4096, 4
    x = jax.ShapeDtypeStruct((1, tokens, heads, 16), jnp.float32)
    compiled = jax.jit(causal_attention).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * tokens * heads * 4 / 8


def test_refuses_shapes_that_do_not_fit():
    x = jnp.zeros((1, 4, 3, 8))
    with pytest.raises(ValueError, match=r"expected a multiple of 2 key heads, got 3"):
        causal_attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(ValueError, match=r"key and value: expected \[1, 4, h_kv, 8\]"):
        causal_attention(x, x[:, :3], x)
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        causal_attention(x, x, x, window=0)
