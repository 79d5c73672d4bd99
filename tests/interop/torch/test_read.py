"""Tokens read back from a torch-owned cache: attention over them is the cache's own."""

import pytest

torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.torch import read  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402

HEADS, D = 2, 32
CASES = {
    "recommended": dict(key_bits=4, value_bits=3, page_size=16),
    "prod": dict(key=tq.QuantizerSpec(D, 4, kind="prod"), value=tq.QuantizerSpec(D, 4, kind="group"), page_size=16),
    "outliers": dict(key=tq.QuantizerSpec(D, 2.5), value=tq.QuantizerSpec(D, 2.5), page_size=8),
    "no_window": dict(window=0, sink_tokens=0, page_size=48, center_keys=False, smooth_keys=False),
    "full_precision": dict(key=None, value=None),
    "bfloat16": dict(dtype="bfloat16", page_size=16),
}


def tokens(rows, count, heads=HEADS, seed=0):
    return torch.randn(rows, count, heads, D, generator=torch.Generator().manual_seed(seed))


def attention(query, keys, values):
    """Causal attention of the latest queries [b, t, h_q, d] over keys and values [b, h_kv, s, d]."""
    count, known = query.shape[1], keys.shape[2]
    mask = torch.ones(count, known, dtype=torch.bool).tril(known - count)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("name", CASES)
def test_attention_over_what_is_read(name, monkeypatch):
    """Blocks of 32 tokens, so that there are several; after a crop as well."""
    monkeypatch.setattr(read, "BLOCK", 32)
    spec = tq.CacheSpec.recommended(HEADS, D, 160, **(dict(window=8, dtype="float32") | CASES[name]))
    cache, query = TorchCache(spec, 2), tokens(2, 3, 4, seed=2)
    k, v = tokens(2, 120), tokens(2, 120, seed=1)
    cache.append(k, v, query=tokens(2, 120, 4, seed=3))
    for length in (120, 101, 5):
        cache.crop(length)
        keys, values = cache.read(torch.float32)
        assert keys.shape == values.shape == (2, HEADS, length, D)
        torch.testing.assert_close(attention(query, keys, values), cache.attend(query), rtol=0, atol=2e-5)


def test_window_and_sinks_are_what_was_stored():
    spec = tq.CacheSpec.recommended(HEADS, D, 96, 2, 2, window=8, dtype="float32", page_size=16)
    cache, k, v = TorchCache(spec, 1), tokens(1, 60), tokens(1, 60, seed=1)
    cache.append(k, v)
    for found, given in zip(cache.read(torch.float32), (k, v), strict=True):
        found = found.transpose(1, 2)
        assert torch.equal(found[:, :4], given[:, :4]) and torch.equal(found[:, -8:], given[:, -8:])
        assert (found - given)[:, 4:-8].abs().amax((2, 3)).min() > 0.01
    assert cache.read(torch.bfloat16)[0].dtype == torch.bfloat16


def test_rows_of_several_lengths():
    """Zeros behind the tokens of a row, though the pages there may hold anything."""
    spec = tq.CacheSpec.recommended(HEADS, D, 96, window=8, dtype="float32", page_size=16)
    cache = TorchCache(spec, 3)
    cache.append(tokens(3, 60), tokens(3, 60, seed=1), lengths=[60, 0, 7])
    cache.arrays.pages.values.scale.view(3, -1, HEADS, 16)[1:] = float("nan")
    keys, values = cache.read(torch.float32)
    assert values.isfinite().all() and not values[1].any() and not keys[2, :, 7:].any() and keys[2, :, :7].all()
    cache.reset()
    assert cache.read(torch.float32)[0].shape == (3, HEADS, 0, D)


def test_known_statistics():
    spec = tq.CacheSpec.recommended(HEADS, D, 96, window=8, dtype="float32", page_size=16)
    mean, weight = jnp.full((HEADS, D), 3.0), jnp.linspace(0.5, 2.0, HEADS * D).reshape(HEADS, D)
    cache, query = TorchCache(spec, 1, statistics=(mean, weight)), tokens(1, 1, 4, seed=2)
    cache.append(tokens(1, 60) + 3, tokens(1, 60, seed=1))
    torch.testing.assert_close(attention(query, *cache.read(torch.float32)), cache.attend(query), rtol=0, atol=2e-5)
