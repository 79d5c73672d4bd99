import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import GROUP, KEY, PROD, VALUE, D, H, make_spec, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import tq_jax as tq
from tq_jax.attention_reference import exact_positions


def states_equal(a, b):
    """Equal but for summation order: statistics to a few digits, codes up to the odd tie."""
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        if "statistics" in str(path):
            np.testing.assert_allclose(x, y, rtol=2e-4, err_msg=str(path))
        elif "pages" in str(path):
            same = np.isclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=2e-3)
            assert np.mean(~same) < 5e-3, path
        else:
            np.testing.assert_array_equal(x, y, err_msg=str(path))


def test_bytes_are_what_the_arrays_hold():
    for key, value in ((KEY, VALUE), (PROD, GROUP), (tq.QuantizerSpec(D, 2.5), tq.QuantizerSpec(D, 8))):
        spec = make_spec(key=key, value=value)
        cache = tq.init_cache(spec, batch=3)
        pages = sum(x.nbytes for x in jax.tree.leaves(cache.pages))
        assert pages == 3 * spec.pages_per_row * spec.page_size * spec.bytes_per_token()
        assert cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
        larger = tq.init_cache(dataclasses.replace(spec, max_tokens=200 + 160), batch=3)
        assert larger.nbytes - cache.nbytes == 3 * 160 * spec.bytes_per_token()


def test_nbytes_is_what_the_allocator_gives():
    before = sum(x.nbytes for x in jax.live_arrays())
    cache = tq.init_cache(make_spec(), batch=2)
    assert sum(x.nbytes for x in jax.live_arrays()) - before == cache.nbytes


def test_three_bit_codes_of_128_channels_take_48_bytes():
    spec = tq.CacheSpec(8, 128, 1024, tq.QuantizerSpec(128, 3), tq.QuantizerSpec(128, 3))
    cache = tq.init_cache(spec, batch=1)
    assert cache.pages.keys.packed.shape[-1] == 48
    assert cache.pages.values.packed.shape[-2] == 48
    assert spec.bytes_per_token() == 8 * 2 * (48 + 2)


def test_ratio_of_four_bits():
    full = tq.CacheSpec.full_precision(num_kv_heads=3, head_dim=64, max_tokens=1)
    four = tq.CacheSpec(3, 64, 4096, tq.QuantizerSpec(64, 4), tq.QuantizerSpec(64, 4))
    assert full.bytes_per_token() / four.bytes_per_token() > 3.7


@settings(deadline=None, max_examples=25)
@given(
    chunks=st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2), min_size=1, max_size=5),
    window=st.sampled_from([0, 1, 24, 500]),
    sinks=st.sampled_from([0, 4]),
)
@pytest.mark.slow
def test_every_token_lives_in_exactly_one_place(chunks, window, sinks):
    spec = make_spec(window=window, sink_tokens=sinks, key=tq.QuantizerSpec(D, 8), value=tq.QuantizerSpec(D, 8))
    cache, total = tq.init_cache(spec, batch=2), np.zeros(2, int)
    for lengths in chunks:
        k = np.zeros((2, 40, H, D), np.float32)
        k[:] = (total[:, None] + np.arange(40) + 1)[:, :, None, None] / 16  # the position, readable in every channel
        cache = tq.append(cache, jnp.asarray(k), jnp.asarray(k), lengths=jnp.asarray(lengths, jnp.int32))
        total += lengths
    assert cache.length.tolist() == total.tolist()
    compressed = np.maximum(total - spec.sinks - spec.ring, 0)
    assert cache.compressed.tolist() == compressed.tolist()
    positions, stored = (np.asarray(x) for x in exact_positions(cache, jnp.arange(2, dtype=jnp.int32)))
    for row in range(2):
        want = [*range(min(sinks, total[row])), *range(sinks + compressed[row], total[row])]
        assert sorted(positions[row][stored[row]].tolist()) == want
        held = np.asarray(cache.exact_keys.view(jnp.bfloat16)[row, 0, :, 0], np.float32)[stored[row]]
        np.testing.assert_allclose(held, (positions[row][stored[row]] + 1) / 16, rtol=5e-3)


@pytest.mark.parametrize("window", [0, 24])
def test_chunks_and_single_tokens_give_the_same_cache(window):
    k, v, q = tokens(2, 90)
    start = tq.append(tq.init_cache(make_spec(window=window), batch=2), k[:, :60], v[:, :60], query=q[:, :60])
    chunk = tq.append(start, k[:, 60:], v[:, 60:], query=q[:, 60:])
    step = jax.jit(lambda c, k, v, q: tq.append(c, k, v, query=q))
    single = start
    for i in range(60, 90):
        single = step(single, k[:, i : i + 1], v[:, i : i + 1], q[:, i : i + 1])
    states_equal(chunk, single)


@pytest.mark.slow
def test_ragged_rows_equal_rows_alone():
    k, v, q = tokens(3, 80)
    lengths = [80, 1, 37]
    together = tq.append(tq.init_cache(make_spec(), batch=3), k, v, query=q, lengths=jnp.asarray(lengths, jnp.int32))
    query = q[:, :1]
    out = tq.attend(query, together)
    for row, count in enumerate(lengths):
        piece = slice(row, row + 1)
        alone = tq.append(
            tq.init_cache(make_spec(), batch=1), k[piece, :count], v[piece, :count], query=q[piece, :count]
        )
        np.testing.assert_allclose(out[piece], tq.attend(query[piece], alone), atol=2e-5)


def test_padding_may_be_poison():
    k, v, q = tokens(2, 80)
    lengths = jnp.asarray([80, 50], jnp.int32)
    clean = tq.append(tq.init_cache(make_spec(), batch=2), k, v, query=q, lengths=lengths)
    bad = [x.at[1, 50:].set(jnp.nan) for x in (k, v, q)]
    poisoned = tq.append(tq.init_cache(make_spec(), batch=2), bad[0], bad[1], query=bad[2], lengths=lengths)
    states_equal(clean, poisoned)
    assert bool(jnp.isfinite(tq.attend(q[:, :1], poisoned)).all())


def test_rows_of_a_shared_cache():
    k, v, q = tokens(2, 70)
    rows = jnp.asarray([3, 0], jnp.int32)
    shared = tq.append(tq.init_cache(make_spec(), batch=4), k, v, query=q, rows=rows)
    alone = tq.append(tq.init_cache(make_spec(), batch=2), k, v, query=q)
    assert shared.length.tolist() == [70, 0, 0, 70]
    np.testing.assert_allclose(tq.attend(q[:, -1:], shared, rows=rows), tq.attend(q[:, -1:], alone), atol=1e-5)


def donating_step(cache, k, v, q):
    cache = tq.append(cache, k, v, query=q)
    return cache, tq.attend(q, cache)


def hlo_type(x):
    names = {"uint8": "u8", "uint16": "u16", "float16": "f16", "float32": "f32"}
    return f"{names[x.dtype.name]}[{','.join(map(str, x.shape))}]"


@pytest.mark.parametrize("full", [False, True])
def test_append_under_jit_with_donation_is_in_place(full):
    spec = make_spec(max_tokens=4096, window=128, page_size=128)
    if full:
        spec = tq.CacheSpec.full_precision(num_kv_heads=H, head_dim=D, max_tokens=4096)
    cache = tq.init_cache(spec, batch=2)
    k, v, q = tokens(2, 1)
    compiled = jax.jit(donating_step, donate_argnums=0).lower(cache, k, v, q).compile()
    text = compiled.as_text()
    copied = re.findall(r"= (\w+\[[\d,]*\])\S* copy\(", text)
    assert not set(copied) & {hlo_type(x) for x in jax.tree.leaves((cache.pages, cache.exact_keys))}
    assert text.split("\n")[0].count("-alias") >= len(jax.tree.leaves(cache)) - 4  # not the random parts
    big = cache.exact_keys if full else cache.pages.keys.packed
    pointer = big.unsafe_buffer_pointer()
    new, _ = compiled(cache, k, v, q)
    assert (new.exact_keys if full else new.pages.keys.packed).unsafe_buffer_pointer() == pointer


@pytest.mark.slow
def test_statistics_come_from_what_is_at_hand():
    k, v, q = tokens(1, 120)
    spec = make_spec(window=64)
    for first in (20, 120):
        cache = tq.append(tq.init_cache(spec, batch=1), k[:, :first], v[:, :first], query=q[:, :first])
        if first == 20:
            assert not cache.statistics.ready.any()  # nothing is compressed yet
            for i in range(20, 69):
                cache = tq.append(cache, k[:, i : i + 1], v[:, i : i + 1], query=q[:, i : i + 1])
        known = np.asarray(k[0, 4 : max(first, 69)])
        assert cache.statistics.ready.all()
        np.testing.assert_allclose(cache.statistics.mean[0], known.mean(0), atol=0.01)
        rms = np.sqrt(np.mean(np.square(np.asarray(q[0, : max(first, 69)]).reshape(-1, H, 2, D)), axis=(0, 2)))
        np.testing.assert_allclose(cache.statistics.weight[0], (rms / known.std(0)) ** 0.4, rtol=0.02)


def test_given_statistics_are_used():
    k, v, _ = tokens(2, 60)
    mean, weight = jnp.full((H, D), 2.0), jnp.full((H, D), 1.5)
    cache = tq.append(tq.init_cache(make_spec(), batch=2, statistics=(mean, weight)), k, v)
    np.testing.assert_array_equal(cache.statistics.mean, np.full((2, H, D), 2.0))
    np.testing.assert_array_equal(cache.statistics.weight, np.full((2, H, D), 1.5))


def test_too_few_tokens_for_statistics():
    k, v, q = tokens(1, 10)
    cache = tq.append(tq.init_cache(make_spec(window=2), batch=1), k, v, query=q)
    np.testing.assert_array_equal(cache.statistics.mean, np.zeros((1, H, D)))
    assert cache.statistics.ready.all()


@pytest.mark.parametrize("keys", [0.0, 1.1, -300.7])
def test_equal_keys_or_zero_queries_are_nothing_to_weigh_by(keys):
    """A head that is dead for the whole prompt may wake up: its later keys must fit their scales."""
    k, v, q = tokens(1, 60)
    for first, query in ((jnp.full_like(k, keys), q), (k.at[:, :, 1].set(keys), q), (k, 0 * q)):
        cache = tq.append(tq.init_cache(make_spec(), batch=1), first, v, query=query)
        cache = tq.append(cache, k, v, query=q)
        assert cache.statistics.ready.all()
        assert 0.1 < float(cache.statistics.weight.min()) <= float(cache.statistics.weight.max()) < 10
        assert bool(jnp.isfinite(tq.attend(q[:, -1:], cache)).all())


def test_overflow_under_jit_is_marked_and_changes_nothing_else():
    k, v, q = tokens(2, 30)
    spec = make_spec(max_tokens=40)
    cache = tq.append(tq.init_cache(spec, batch=2), k, v, query=q, lengths=jnp.asarray([30, 5], jnp.int32))
    after = jax.jit(tq.append)(cache, k, v)
    assert after.length.tolist() == [30, 35]
    assert after.overflow.tolist() == [True, False]
    out = tq.attend(q[:, -1:], after)
    assert bool(jnp.isnan(out[0]).all())
    assert bool(jnp.isfinite(out[1]).all())
    with pytest.raises(ValueError, match=r"expected at most max_tokens=40 tokens per row, got \[60, 35\]"):
        tq.append(cache, k, v)


def test_empty_batch_and_empty_chunk():
    cache = tq.init_cache(make_spec(), batch=0)
    k = jnp.zeros((0, 5, H, D))
    assert tq.append(cache, k, k).length.shape == (0,)
    assert tq.attend(jnp.zeros((0, 5, H, D)), cache).shape == (0, 5, H, D)
    cache = tq.init_cache(make_spec(), batch=2)
    assert tq.append(cache, jnp.zeros((2, 0, H, D)), jnp.zeros((2, 0, H, D))).length.tolist() == [0, 0]


@pytest.mark.slow
def test_vmap_over_caches():
    k, v, q = tokens(3, 50)
    cache = jax.vmap(lambda k, v, q: tq.append(tq.init_cache(make_spec(), batch=1), k[None], v[None], query=q[None]))(
        k, v, q
    )
    together = tq.append(tq.init_cache(make_spec(), batch=3), k, v, query=q)
    out = jax.vmap(lambda q, c: tq.attend(q[None], c))(q[:, -1:], cache)
    np.testing.assert_allclose(out[:, 0], tq.attend(q[:, -1:], together), atol=2e-5)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "expected max_tokens of at least 1, got 0", {"max_tokens": 0}),
        (ValueError, "expected window of at least 0, got -1", {"window": -1}),
        (ValueError, r"expected dtype in \('bfloat16', 'float16', 'float32'\), got 'int8'", {"dtype": "int8"}),
        (ValueError, "expected key and value specs both or neither", {"key": None}),
        (ValueError, r"expected a key spec of dim 32 \(head_dim\), got dim=64", {"key": tq.QuantizerSpec(64)}),
        (NotImplementedError, r"keys are .* kind in \('mse', 'prod'\), got kind='group'", {"key": GROUP}),
        (NotImplementedError, r"values are .* kind in \('mse', 'group'\), got kind='prod'", {"value": PROD}),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked_shapes")
def test_spec_errors(error, message, options):
    with pytest.raises(error, match=message):
        make_spec(**options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_append_errors():
    cache = tq.init_cache(make_spec(), batch=2)
    k, v, q = tokens(2, 6)
    ints = jnp.asarray([1, 1], jnp.int32)
    cases = [
        (r"expected k of shape \(2, tokens, 2, 32\), got \(1, 6, 2, 32\)", (k[:1], v), {}),
        (r"expected k of shape \(2, tokens, 2, 32\), got \(2, 6, 1, 32\)", (k[:, :, :1], v), {}),
        (r"expected v of the shape of k \(2, 6, 2, 32\), got \(2, 5, 2, 32\)", (k, v[:, :5]), {}),
        (r"expected query of shape \(2, 6, a multiple of 2, 32\), got \(2, 6, 3, 32\)", (k, v), {"query": q[:, :, :3]}),
        ("expected k to be floating point, got dtype int32", (k.astype(jnp.int32), v), {}),
        (r"expected lengths to be integers of shape \(2,\), got int32 \(1,\)", (k, v), {"lengths": ints[:1]}),
        (r"expected lengths from 0 to 6, got \[7, 7\]", (k, v), {"lengths": ints * 7}),
        (r"expected different rows from 0 to 1, got \[1, 1\]", (k, v), {"rows": ints}),
        ("expected finite v, got NaN or infinity", (k, v.at[1, 2, 0, 3].set(jnp.inf)), {}),
        ("expected finite k, got NaN or infinity", (k.at[0, 0, 0, 0].set(jnp.nan), v), {}),
    ]
    for message, arguments, options in cases:
        with pytest.raises(ValueError, match=message):
            tq.append(cache, *arguments, **options)


def test_tokens_too_large_for_what_holds_them():
    k, v, q = tokens(2, 60)
    cache = tq.init_cache(make_spec(dtype="float16"), batch=2)
    for name, large in (("k", (k * 1e5, v)), ("v", (k, v * 1e5))):
        with pytest.raises(
            ValueError, match=rf"expected finite {name}, got NaN or infinity as float16 \(at most 65504"
        ):
            tq.append(cache, *large)
    large = v.at[1].multiply(3e5)
    cache = tq.init_cache(make_spec(value=GROUP), batch=2)
    held = tq.append(cache, k, large, lengths=jnp.asarray([20, 20], jnp.int32))  # none has left the window
    message = r"expected tokens whose scales fit float16, got larger ones leaving the window of rows \[1\]"
    with pytest.raises(ValueError, match=message):
        tq.append(held, k, large)
    marked = jax.jit(tq.append)(held, k, large)
    assert jnp.isnan(tq.attend(q[:, -1:], marked)).any(axis=(1, 2, 3)).tolist() == [False, True]


@pytest.mark.usefixtures("unchecked_shapes")
def test_init_errors():
    with pytest.raises(ValueError, match="expected a batch of at least 0 rows, got -1"):
        tq.init_cache(make_spec(), batch=-1)
    with pytest.raises(ValueError, match=r"expected a mean of shape \(2, 32\) or \(3, 2, 32\), got \(2, 2, 32\)"):
        tq.init_cache(make_spec(), batch=3, statistics=(jnp.zeros((2, H, D)), jnp.ones((H, D))))
    for mean, weight in ((jnp.nan, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, jnp.inf)):
        with pytest.raises(ValueError, match="expected finite means and positive, finite weights of channels, got"):
            tq.init_cache(make_spec(), batch=3, statistics=(jnp.full((H, D), mean), jnp.full((H, D), weight)))
    plain = make_spec(center_keys=False, smooth_keys=False)
    with pytest.raises(ValueError, match="expected statistics=None for a cache that neither centres nor smooths"):
        tq.init_cache(plain, batch=3, statistics=(jnp.zeros((H, D)), jnp.ones((H, D))))
    with pytest.raises(ValueError, match="expected a key quantizer of .*bits=4.*, got .*bits=2"):
        tq.init_cache(make_spec(), batch=1, key_quantizer=tq.make_quantizer(tq.QuantizerSpec(D, 2)))
