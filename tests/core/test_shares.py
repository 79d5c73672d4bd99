"""A cache shared out over a mesh axis attends as one cache does, and holds the same codes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from pallas_kernels.attention import LogitOptions
from pallas_kernels.attention.chunk import attend_chunk
from tq_jax.shares import append_share, attend_shares, attend_stripes, share_spec

DEVICES, ROWS, TOKENS = 4, 2, 100
SPEC = tq.CacheSpec(
    num_kv_heads=2, head_dim=64, max_tokens=160, key=tq.QuantizerSpec(dim=64, bits=4),
    value=tq.QuantizerSpec(dim=64, bits=4), window=16, sink_tokens=4, page_size=16, dtype="float32",
    center_keys=False, smooth_keys=False,
)  # fmt: skip
EXACT = tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=64, max_tokens=160, dtype="float32")


def mesh_of(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("sequence",), axis_types=auto, devices=jax.devices()[:devices])


def over_devices(function):
    """The function on every device: its first argument is a cache with rows of all devices, the others are whole."""
    mesh = mesh_of(DEVICES)

    def run(cache, *arrays):
        rows = jax.tree_util.tree_map_with_path(
            lambda path, _: jax.P() if "quantizer" in str(path[0]) else jax.P("sequence"), cache
        )
        results = (rows, jax.P())
        return jax.shard_map(
            function, mesh=mesh, in_specs=(rows, *[jax.P()] * len(arrays)), out_specs=results, check_vma=False
        )(cache, *arrays)

    return jax.jit(run)


@pytest.fixture(scope="module")
def chunks():
    """Keys and values [ROWS, TOKENS, 2, 64], queries of 4 heads."""
    keys = jax.random.split(jax.random.key(0), 3)
    k, v, q = (jax.random.normal(key, (ROWS, TOKENS, heads, 64)) for key, heads in zip(keys, (2, 2, 4), strict=True))
    return k, v, q


def filled(spec, chunks, lengths, sizes):
    """One cache and a shared one after the same chunks of tokens, and whether both attended alike on the way."""
    k, v, q = chunks
    one = tq.init_cache(spec, ROWS)
    shared = tq.init_cache(share_spec(spec, DEVICES), DEVICES * ROWS)

    def step(cache, k, v, q, counts):
        start = jax.lax.psum(cache.length, "sequence")
        out = attend_shares(q, cache, axis="sequence", chunk=(k, v), lengths=counts)
        return append_share(cache, k, v, axis="sequence", start=start, query=q, lengths=counts), out

    run, at = over_devices(step), 0
    for size in sizes:
        piece = [x[:, at : at + size] for x in (k, v, q)]
        counts = jnp.clip(lengths - at, 0, size)
        expected = tq.attend(piece[2], one, chunk=(piece[0], piece[1]), lengths=counts)
        one = tq.append(one, piece[0], piece[1], query=piece[2], lengths=counts)
        shared, found = run(shared, *piece, counts)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        at += size
    return one, shared


def by_position(shared):
    """Rows of all devices [DEVICES, ROWS, ...] of an array."""
    return np.asarray(shared).reshape(DEVICES, ROWS, *shared.shape[1:])


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize("spec", [SPEC, EXACT], ids=["packed", "exact"])
def test_shares_are_one_cache(chunks, spec):
    lengths = jnp.array([TOKENS, 37], jnp.int32)
    one, shared = filled(spec, chunks, lengths, (61, 1, 1, 3, 33, 1))
    np.testing.assert_array_equal(by_position(shared.length).sum(0), lengths)
    np.testing.assert_array_equal(by_position(shared.compressed).sum(0), one.compressed)
    assert np.ptp(by_position(shared.length), axis=0).max() <= 1
    if not spec.compressed:
        return
    # Codes of token p, of a sequence behind its sinks, are those of one cache: nothing else was quantized with it.
    pages = (one.pages.keys.packed, shared.pages.keys.packed)
    whole, parts = (np.moveaxis(np.asarray(x), 2, 1) for x in pages)  # [pages, tokens, heads, bytes]
    whole = whole.reshape(ROWS, -1, *whole.shape[2:])
    parts = parts.reshape(DEVICES, ROWS, -1, *parts.shape[2:])
    for row in range(ROWS):
        for token in range(int(one.compressed[row])):
            np.testing.assert_array_equal(parts[token % DEVICES, row, token // DEVICES], whole[row, token])


def test_overflow_of_one_device_is_nan_on_all(chunks):
    k, v, q = chunks
    cache = tq.init_cache(share_spec(SPEC, DEVICES), DEVICES * ROWS)
    cache = dataclasses.replace(cache, overflow=cache.overflow.at[2 * ROWS].set(True))

    def step(cache, k, v, q):
        out = attend_shares(q, cache, axis="sequence", chunk=(k, v))
        return cache, out

    found = over_devices(step)(cache, *(x[:, :1] for x in (k, v, q)))[1]
    assert bool(jnp.isnan(found[0]).all())
    assert bool(jnp.isfinite(found[1]).all())


def test_a_full_share_is_marked(chunks):
    """A chunk that does not fit is left out and marked, as in one cache."""
    spec = dataclasses.replace(EXACT, max_tokens=40, window=40)
    k, v, q = chunks

    def step(cache, k, v, q):
        start = jax.lax.psum(cache.length, "sequence")
        return append_share(cache, k, v, axis="sequence", start=start, query=q), start

    shared = tq.init_cache(share_spec(spec, DEVICES), DEVICES * ROWS)
    run = over_devices(step)
    shared, _ = run(shared, *(x[:, :40] for x in (k, v, q)))
    assert not bool(shared.overflow.any())
    shared, _ = run(shared, *(x[:, :1] for x in (k, v, q)))
    assert by_position(shared.overflow).sum(0).tolist() == [1, 1]


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 9])
def test_options_and_kernels(chunks, size):
    """Kernels, interpreted, agree inside shard_map; so do soft-cap, scale, sink logits and rows."""
    k, v, q = (x[:, :64] for x in chunks)
    options = {"softcap": 5.0, "scale": 0.2, "sink_logits": jnp.array([0.5, -1.0, 2.0, 0.0])}
    one = tq.append(tq.init_cache(SPEC, ROWS), k, v, query=q)
    rows = jnp.array([1, 0], jnp.int32)
    piece = [x[:, 64 : 64 + size] for x in chunks]
    expected = tq.attend(piece[2], one, chunk=(piece[0], piece[1]), rows=rows, **options)

    def fill(cache, k, v, q):
        start = jnp.zeros(ROWS, jnp.int32)
        return append_share(cache, k, v, axis="sequence", start=start, query=q), start

    def step(cache, k, v, q, implementation):
        chunk = (k, v)
        return cache, attend_shares(
            q, cache, axis="sequence", chunk=chunk, rows=rows, implementation=implementation, **options
        )

    shared, _ = over_devices(fill)(tq.init_cache(share_spec(SPEC, DEVICES), DEVICES * ROWS), k, v, q)
    for implementation, tolerance in (("reference", 2e-5), ("triton", 2e-2)):
        run = over_devices(functools.partial(step, implementation=implementation))
        np.testing.assert_allclose(run(shared, *piece)[1], expected, atol=tolerance)


@pytest.mark.parametrize("devices", [2, 4])
def test_stripes_are_causal_attention(chunks, devices):
    """Keys and values that go round the devices give what one device computes, soft-capped or not."""
    k, v, q = chunks
    mesh = mesh_of(devices)

    def striped(x):
        return jnp.moveaxis(x.reshape(ROWS, -1, devices, *x.shape[2:]), 2, 0)

    for softcap in (None, 3.0):

        def attend(q, k, v, softcap=softcap):
            return attend_stripes(q[0], k[0], v[0], axis="sequence", softcap=softcap)[None]

        run = jax.shard_map(attend, mesh=mesh, in_specs=jax.P("sequence"), out_specs=jax.P("sequence"), check_vma=False)
        expected = attend_chunk(q, k, v, options=LogitOptions(scale=0.125, softcap=softcap))
        found = jax.jit(run)(*(striped(x) for x in (q, k, v)))
        np.testing.assert_allclose(found, striped(expected.acc / expected.total[..., None]), atol=2e-6)


def test_refuses():
    with pytest.raises(ValueError, match=r"devices: expected at least 1, got 0"):
        share_spec(SPEC, 0)
