"""The kernels around encoding, interpreted, against `tq_jax.append` on the same tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_encoder import encode_by_reference

import tq_jax as tq
from pallas_kernels.append.whole_cache import AppendPlan, append_cache
from pallas_kernels.encode import launch_triton as encode
from tq_jax.attention import arrays_of
from tq_jax.cache import from_storage, to_storage
from tq_jax.quantizer import encoder

FOUR = tq.QuantizerSpec(64, 4)
SPEC = tq.CacheSpec(2, 64, 80, FOUR, FOUR, window=13, sink_tokens=3, page_size=16)
SPECS = {
    "window and sinks": SPEC,
    "no window": dataclasses.replace(SPEC, window=0, smooth_keys=False, center_keys=False, dtype="float32"),
    "neither": dataclasses.replace(SPEC, window=0, sink_tokens=0, dtype="float16"),
    "no pages": dataclasses.replace(SPEC, max_tokens=16),
    "full precision": tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=80, max_tokens=30),
}


def chunk(spec: tq.CacheSpec, count: int, seed: int):
    shape = (2, 3, count, spec.num_kv_heads, spec.head_dim)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), spec.dtype)


def append(cache: tq.Cache, k, v, counts=None, **options) -> tq.Cache:
    """Appends to a cache by `append_cache`."""
    spec = cache.spec
    keys, values = (from_storage(spec, x).astype(spec.dtype) for x in (cache.exact_keys, cache.exact_values))
    arrays = dataclasses.replace(
        arrays_of(cache), exact_keys=keys, exact_values=values, overflow=cache.overflow.astype(jnp.uint8)
    )
    encoders = [None if q is None else encoder(q) for q in (cache.key_quantizer, cache.value_quantizer)]
    plan = AppendPlan(spec.sinks, spec.max_tokens, interpret=True, **options)
    new = append_cache(k, v, arrays, plan, key=encoders[0], value=encoders[1], counts=counts)
    return dataclasses.replace(
        cache,
        pages=new.pages,
        exact_keys=to_storage(spec, new.exact_keys),
        exact_values=to_storage(spec, new.exact_values),
        length=new.length,
        compressed=new.compressed,
        overflow=new.overflow.astype(bool),
    )


def assert_same(found: tq.Cache, want: tq.Cache) -> None:
    for (name, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(name))


QUICK = {"window and sinks", "neither"}


@pytest.mark.sampled
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SPECS])
def test_the_bytes_of_append(name, monkeypatch):
    """Chunks longer and shorter than the window, ragged, single, with NaN behind the end, too long for the cache."""
    monkeypatch.setattr(encode, "encode_pages", encode_by_reference)
    spec = SPECS[name]
    found = want = tq.init_cache(spec, 3, statistics=_statistics(spec))
    sizes = [(1, [1, 1, 0]), (22, [22, 1, 18]), (1, [1, 1, 1]), (22, [3, 22, 0]), (22, [22, 22, 14]), (22, [22, 22, 2])]
    program = jax.jit(tq.append), jax.jit(append)
    for seed, (count, counts) in enumerate(sizes):
        k, v = chunk(spec, count, seed)
        real = np.arange(count) < np.array(counts)[:, None]
        k, v = (jnp.where(real[:, :, None, None], x, jnp.nan) for x in (k, v))
        lengths = jnp.asarray(counts, jnp.int32)
        want = program[0](want, k, v, lengths=lengths)
        found = program[1](found, k, v, None if min(counts) == count else lengths)
        assert_same(found, want)
    assert bool(want.overflow.any()) == (spec.max_tokens < 80)


@pytest.mark.sampled
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SPECS])
def test_rows_by_kernels(name, monkeypatch):
    """Some rows in another order, rows that overflow."""
    monkeypatch.setattr(encode, "encode_pages", encode_by_reference)
    spec = SPECS[name]
    found = want = tq.init_cache(spec, 5, statistics=_statistics(spec))
    by = {how: jax.jit(functools.partial(tq.append, implementation=how)) for how in ("reference", "triton")}
    chunks = ([22, 1, 18], [4, 0, 3]), ([1, 1, 1], [0, 4, 1]), ([35, 2, 0], [3, 4, 1]), ([40, 40, 3], [3, 4, 2])
    for seed, (counts, rows) in enumerate(chunks):
        k, v = chunk(spec, max(counts), seed)
        options = {"lengths": jnp.asarray(counts, jnp.int32), "rows": jnp.asarray(rows, jnp.int32)}
        want = by["reference"](want, k, v, **options)
        found = by["triton"](found, k, v, **options)
        assert_same(found, want)
    assert bool(want.overflow.any()) == (spec.max_tokens < 97)


def test_rows_outside_the_cache_change_nothing(monkeypatch):
    monkeypatch.setattr(encode, "encode_pages", encode_by_reference)
    run = jax.jit(functools.partial(tq.append, implementation="triton"))
    k, v = chunk(SPEC, 8, 0)
    alone = run(tq.init_cache(SPEC, 3), k[:1], v[:1], rows=jnp.asarray([2], jnp.int32))
    others = run(tq.init_cache(SPEC, 3), k, v, rows=jnp.asarray([2, 3, -1], jnp.int32))
    assert_same(others, alone)


STATISTICS = {
    "both": ({}, True),
    "no queries": ({}, False),
    "float32, no sinks, mean alone": ({"dtype": "float32", "sink_tokens": 0, "smooth_keys": False}, True),
    "weight alone": ({"center_keys": False}, True),
    "few tokens": ({"window": 20}, True),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_by_kernel(name, monkeypatch):
    """When the first token of a row leaves, its statistics are fixed, from the ring and a chunk of up to 8 tokens."""
    monkeypatch.setattr(encode, "encode_pages", encode_by_reference)
    options, told = STATISTICS[name]
    spec = dataclasses.replace(SPEC, **({"window": 40, "max_tokens": 60} | options))
    found = want = tq.init_cache(spec, 4)
    by = {how: jax.jit(functools.partial(tq.append, implementation=how)) for how in ("reference", "triton")}
    rows = jnp.asarray([3, 0, 1], jnp.int32)
    for seed, counts in enumerate([[8, 3, 8], *[[8, 8, 7]] * 5, [1, 8, 0], [8, 8, 8], [8, 8, 8]]):
        k, v = (x + seed % 3 for x in chunk(spec, 8, seed))
        query = jnp.concatenate([v, k, v, k], axis=2) if told else None
        real = (np.arange(8) < np.array(counts)[:, None])[:, :, None, None]
        k, v, query = (None if x is None else jnp.where(real, x, jnp.nan) for x in (k, v, query))
        chunks = {"query": query, "lengths": jnp.asarray(counts, jnp.int32), "rows": rows}
        want, found = by["reference"](want, k, v, **chunks), by["triton"](found, k, v, **chunks)
        for field in dataclasses.fields(want.statistics):
            a, b = (np.asarray(getattr(cache.statistics, field.name), np.float32) for cache in (found, want))
            np.testing.assert_allclose(a, b, rtol=5e-6, atol=1e-6, err_msg=field.name)
        for counter in ("length", "compressed", "overflow", "exact_keys", "exact_values"):
            np.testing.assert_array_equal(getattr(found, counter), getattr(want, counter))
    ready = want.statistics.ready
    assert ready[rows].all() and not ready[2] and bool(want.overflow.any())
    assert bool((want.statistics.mean[rows] != 0).any()) == (spec.center_keys and name != "few tokens")
    assert bool((want.statistics.weight[rows] != 1).any()) == (spec.smooth_keys and name != "few tokens")


@pytest.mark.usefixtures("unchecked_shapes")
def test_limits_are_named():
    k = jnp.ones((1, 1, 2, 48), jnp.bfloat16)
    cache = tq.init_cache(tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=48, max_tokens=30), 1)
    with pytest.raises(NotImplementedError, match=r"head dims \(64, .*, got 48"):
        tq.append(cache, k, k, implementation="triton")
    with pytest.raises(NotImplementedError, match="implementation='cuda'; append has: .*'triton'"):
        tq.append(cache, k, k, implementation="cuda")


def _statistics(spec: tq.CacheSpec):
    if not spec.has_statistics:
        return None
    mean, weight = np.random.default_rng(9).standard_normal((2, spec.num_kv_heads, spec.head_dim)).astype(np.float32)
    return jnp.asarray(mean), jnp.asarray(np.exp(weight))
