"""Caches that keep a sliding window: they give what caches with every token give, in fewer bytes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import D, H, make_spec, tokens

import tq_jax as tq
from tq_jax.attention_checks import visible_tokens
from tq_jax.shares import share_spec
from tq_jax.store import spec_fields

SPECS = {
    "pages": (make_spec(window=8, dtype="float32"), 40),
    "no ring": (make_spec(window=0, dtype="float32"), 40),
    "within the ring": (make_spec(window=24, dtype="float32"), 9),
    "full precision": (
        tq.CacheSpec.full_precision(num_kv_heads=H, head_dim=D, max_tokens=200, dtype="float32"), 12
    ),
}  # fmt: skip
"""Specs that keep every token, and a sliding window for each. A page has 16 tokens."""


def poisoned(cache):
    """The cache with NaN, or bytes that mean something, wherever no token is."""

    def poison(x):
        value = {"uint8": 0xA5, "uint16": 0x7FC0}.get(x.dtype.name, float("nan"))
        return jnp.full_like(x, value)

    held = {name: jax.tree.map(poison, getattr(cache, name)) for name in ("pages", "exact_keys", "exact_values")}
    return dataclasses.replace(cache, **held)


@pytest.fixture(params=SPECS)
def pair(request):
    """A cache with every token, one with a window, and the window."""
    spec, window = SPECS[request.param]
    local = dataclasses.replace(spec, sliding_window=window)
    return *(poisoned(tq.init_cache(x, batch=2)) for x in (spec, local)), window


@pytest.mark.sampled
def test_a_window_gives_what_all_tokens_give(pair):
    """Single tokens, ragged chunks, chunks longer than all that the row keeps."""
    whole, local, window = pair
    k, v, q = tokens(2, 190)
    start = 0
    for count in (3, 1, 70, 1, 96, 1):
        key, value, query = (x[:, start : start + count] for x in (k, v, q))
        lengths = jnp.asarray([count, max(count - 5, 1)], jnp.int32)
        options = dict(chunk=(key, value), lengths=lengths)
        want = tq.attend(query, whole, sliding_window=window, **options)
        np.testing.assert_allclose(tq.attend(query, local, **options), want, atol=2e-6)
        whole, local = (tq.append(x, key, value, query=query, lengths=lengths) for x in (whole, local))
        last = query[:, :1]
        want = tq.attend(last, whole, sliding_window=window)
        assert bool(jnp.isfinite(want).all())
        np.testing.assert_allclose(tq.attend(last, local), want, atol=2e-6)
        start += count
    assert local.length.tolist() == whole.length.tolist() == [172, 160]
    if whole.pages is not None:
        assert local.compressed.tolist() == whole.compressed.tolist()
        for new, old in zip(jax.tree.leaves(local.statistics), jax.tree.leaves(whole.statistics), strict=True):
            np.testing.assert_array_equal(new, old)


@pytest.mark.slow
def test_kernels_and_the_reference_place_tokens_alike():
    spec = tq.CacheSpec(
        2, 64, 300, tq.QuantizerSpec(64, 4), tq.QuantizerSpec(64, 4), window=8, page_size=16, sliding_window=40
    )
    assert spec.pages_per_row == 3
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal((2, 2, 123, 2, 64)))
    q = jnp.asarray(rng.standard_normal((2, 123, 4, 64)), jnp.float32)
    found, want = (poisoned(tq.init_cache(spec, batch=2)) for _ in range(2))
    start = 0
    for count in (75, 1, 20, 5):
        key, value, query = (x[:, start : start + count] for x in (k, v, q))
        options = dict(query=query, lengths=jnp.asarray([count, count - 1], jnp.int32))
        want = tq.append(want, key, value, **options)
        found = tq.append(found, key, value, implementation="triton", **options)
        start += count
    assert found.compressed.tolist() == want.compressed.tolist() == [101 - 12, 97 - 12]
    for name in ("exact_keys", "length"):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
    scales = [np.asarray(x.pages.values.scale, np.float32) for x in (found, want)]
    np.testing.assert_allclose(*scales, rtol=2e-3)
    plain = dict(lengths=jnp.asarray([1, 1], jnp.int32))
    for query, options in ((q[:, :1], plain), (q[:, :3], {"chunk": (k[:, :3], v[:, :3])})):
        outputs = [
            tq.attend(query, want, implementation=name, precise=name == "triton", **options)
            for name in ("reference", "triton")
        ]
        np.testing.assert_allclose(*outputs, atol=0.01)


def test_bytes_follow_from_the_window():
    spec = make_spec(window=8, max_tokens=100_000, sliding_window=40)
    cache = tq.init_cache(spec, batch=1)
    # 39 tokens before a query, 8 of them in the ring: 31 in pages of 16, and one page that fills.
    assert (spec.pages_per_row, spec.kept_tokens) == (3, 41)
    assert cache.nbytes == tq.init_cache(dataclasses.replace(spec, max_tokens=1000), batch=1).nbytes
    full = tq.CacheSpec.full_precision(num_kv_heads=H, head_dim=D, max_tokens=100_000, sliding_window=40)
    assert (full.ring, full.pages_per_row, full.kept_tokens) == (40, 0, 40)
    assert tq.init_cache(full, batch=1).exact_keys.shape == (1, H, 40, D)
    # A window as long as the row changes nothing.
    long = make_spec(sliding_window=500)
    assert (long.pages_per_row, long.kept_tokens) == (make_spec().pages_per_row, 200)
    assert visible_tokens(long, None, appended=200) is None


def test_queries_that_would_see_overwritten_tokens_are_refused():
    spec = make_spec(window=8, sliding_window=40)
    k, v, q = tokens(1, 60)
    cache = tq.append(tq.init_cache(spec, batch=1), k, v)
    with pytest.raises(ValueError, match=r"at most the 41 latest tokens .* sliding_window=60, which see 60"):
        tq.attend(q[:, -1:], cache, sliding_window=60)
    with pytest.raises(ValueError, match=r"got 5 appended queries .* which see 44; attend with chunk="):
        tq.attend(q[:, -5:], cache)
    assert tq.attend(q[:, -5:], cache, sliding_window=36).shape == (1, 5, 2 * H, D)
    with pytest.raises(ValueError, match="expected sliding_window of at least 1, got 0"):
        make_spec(sliding_window=0)
    with pytest.raises(NotImplementedError, match="keep all of them: expected sliding_window=None, got 40"):
        share_spec(spec, 2)
    assert share_spec(spec, 1) == spec


def test_chunks_that_are_appended_first():
    """A spec that keeps t - 1 tokens more serves chunks of t tokens that see each other as the cache holds them."""
    k, v, q = tokens(2, 150)
    whole = tq.append(tq.init_cache(make_spec(window=8), batch=2), k, v, query=q)
    local = tq.append(tq.init_cache(make_spec(window=8, sliding_window=40 + 19), batch=2), k, v, query=q)
    want = tq.attend(q[:, -20:], whole, sliding_window=40)
    np.testing.assert_allclose(tq.attend(q[:, -20:], local, sliding_window=40), want, atol=2e-6)


@pytest.mark.parametrize("full", [False, True])
def test_append_under_jit_with_donation_is_in_place(full):
    spec = make_spec(max_tokens=4096, window=128, page_size=128, sliding_window=500)
    if full:
        spec = tq.CacheSpec.full_precision(num_kv_heads=H, head_dim=D, max_tokens=4096, sliding_window=500)
    cache = tq.init_cache(spec, batch=2)
    k, v, q = tokens(2, 1)

    def step(cache, k, v, q):
        cache = tq.append(cache, k, v, query=q)
        return cache, tq.attend(q, cache)

    text = jax.jit(step, donate_argnums=0).lower(cache, k, v, q).compile().as_text()
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", text)
    stored = jax.tree.leaves((cache.pages, cache.exact_keys))
    assert not set(copied) & {",".join(map(str, x.shape)) for x in stored}
    assert text.split("\n")[0].count("-alias") >= len(jax.tree.leaves(cache)) - 4  # not the random parts


@pytest.mark.sampled
@pytest.mark.parametrize("full", [False, True])
def test_other_sizes_and_files(full, tmp_path):
    spec = make_spec(window=8, sliding_window=40)
    if full:
        spec = tq.CacheSpec.full_precision(num_kv_heads=H, head_dim=D, max_tokens=200, sliding_window=40)
    k, v, q = tokens(2, 130)
    cache = tq.append(tq.init_cache(spec, batch=2), k, v, query=q)
    tq.save_cache(cache, tmp_path / "cache.safetensors")
    for again in (tq.load_cache(tmp_path / "cache.safetensors", max_tokens=5000), tq.resize(cache, 131)):
        assert again.spec.sliding_window == 40
        np.testing.assert_array_equal(tq.attend(q[:, :1], again), tq.attend(q[:, :1], cache))
    # From a row with room for all its tokens to one that overwrites.
    part = [x[:, :30] for x in (k, v)]
    short = dataclasses.replace(spec, max_tokens=30, window=30 if full else spec.window)
    small, large = (tq.append(tq.init_cache(x, batch=2), *part) for x in (short, spec))
    grown, large = (tq.append(x, k[:, 30:], v[:, 30:]) for x in (tq.resize(small, 200), large))
    np.testing.assert_array_equal(tq.attend(q[:, :1], grown), tq.attend(q[:, :1], large))
    assert "sliding_window" in spec_fields(spec)
