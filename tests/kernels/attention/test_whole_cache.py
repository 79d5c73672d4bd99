"""Attention over a cache in three launches, interpreted, against the reference."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from pallas_kernels.attention import MAX_QUERY_TOKENS, LogitOptions, TileConfig, attend_cache, exact
from pallas_kernels.attention.merge_triton import MergeInputs, Splits, merge_plan, merge_splits
from pallas_kernels.attention.pipeline import prepare_queries
from pallas_kernels.attention.whole_cache import prepare_inputs
from pallas_kernels.compat.lowering import lower_for_cuda, triton_kernels
from pallas_kernels.numerics import HIDDEN
from tests.kernels.cases.whole_cache import CASES, attend_case, filled_cache, make_spec, relative_error
from tq_jax import attention
from tq_jax.quantizer import sketch_gain, sketch_query, to_rotated

TILES = TileConfig(tile=64, programs=16)
QUICK = {"5 queries, everything", "5 new tokens, everything", "20 new tokens"}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Few programs, because interpreted programs run one after the other."""
    monkeypatch.setattr(exact, "PROGRAMS", 16)


@pytest.mark.sampled
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_parity_with_the_reference(name):
    case = CASES[name]
    attend, query, cache = attend_case(case)
    want = attend(query, cache, implementation="reference")
    config = TILES if case.count <= MAX_QUERY_TOKENS else None
    got = attend(query, cache, implementation="triton", config=config)
    assert got.dtype == query.dtype
    assert relative_error(got, want) <= case.tolerance(precise=False)
    np.testing.assert_array_equal(got, attend(query, cache, implementation="triton", config=config))


@functools.cache
def plain():
    return attend_case(dataclasses.replace(CASES["plain"], lengths=(200, 0)))


@pytest.mark.slow
def test_rows_that_overflow_are_nan():
    _, query, cache = plain()
    cache = dataclasses.replace(cache, overflow=jnp.array([False, True]))
    rows = jnp.array([1, 0])
    out = tq.attend(query[rows], cache, rows=rows, implementation="triton", config=TILES)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_partial_attention():
    """Log-sum-exps and outputs in the original basis, ready for a merge with the attention of another device."""
    _, query, cache = plain()
    plan = dataclasses.replace(attention.attend_plan(cache.spec, LogitOptions(0.125), config=TILES), partial=True)
    part = attend_cache(query, attention.arrays_of(cache), plan)
    assert np.asarray(part.total).tolist() == [[[1.0] * 8], [[0.0] * 8]]
    np.testing.assert_array_equal(part.peak[1], np.full((1, 8), HIDDEN, np.float32))
    want = tq.attend(query, cache, scale=0.125, implementation="reference")
    assert relative_error(part.acc, want) <= 2e-4
    # A learned logit as large as the log-sum-exp takes half.
    half = tq.attend(query[:1], cache, rows=jnp.array([0]), scale=0.125, sink_logits=part.peak[0, 0])
    np.testing.assert_allclose(2 * half[0], part.acc[0], atol=1e-4)


def test_merge_combines_splits():
    rng = np.random.default_rng(0)
    shape, group, splits = (2, 3, 6, 80), 3, (5, 2)
    parts = [
        Splits(
            *(
                jnp.asarray(x, jnp.float32)
                for x in (
                    rng.standard_normal((2, 2, n, 9, 80)),
                    20 * rng.standard_normal((2, 2, n, columns)),
                    rng.uniform(1, 2, (2, 2, n, columns)),
                )
            )
        )
        for n, columns in zip(splits, (16, 9), strict=True)
    ]
    plan = merge_plan(shape, splits=5, dtype="float32", partial=True, interpret=True)
    out, log_sum, seen = merge_splits(MergeInputs(*parts), plan)
    acc, peak, total = (
        np.concatenate([np.asarray(getattr(p, name), np.float64)[:, :, :, :9] for p in parts], axis=2)
        for name in ("acc", "peak", "total")
    )
    weight = np.exp2(peak - peak.max(2, keepdims=True))
    sums = (weight * total).sum(2)
    want = (weight[..., None] * acc).sum(2) / sums[..., None]

    def per_query(x):
        return np.moveaxis(x.reshape(2, 2, 3, group, *x.shape[3:]), 2, 1).reshape(2, 3, 6, *x.shape[3:])

    np.testing.assert_allclose(out, per_query(want), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_sum, per_query(np.log(2) * peak.max(2) + np.log(sums)), rtol=1e-5)
    assert (seen == 1).all()


@pytest.mark.parametrize("bits", [3.5, 3])
def test_prepared_queries(bits):
    spec = make_spec(128, bits=(bits, 4), key=None if bits == 3.5 else {"kind": "prod", "bits": 3})
    cache, query = filled_cache(spec, (300, 90), group=2)
    rows, query = jnp.array([1, 0]), query[:, :3].astype(jnp.bfloat16)
    plan = attention.attend_plan(cache.spec, LogitOptions(0.3))
    arrays = attention.arrays_of(cache)
    inputs = prepare_inputs(query, arrays, rows, jnp.array([2, 3]))
    got = prepare_queries(inputs, arrays.pages, plan, stored_dtype=arrays.exact_keys.dtype)
    mean, weight = (jnp.repeat(x[rows], 2, axis=1)[:, None] for x in (cache.statistics.mean, cache.statistics.weight))
    query = query.astype(jnp.float32)
    want = to_rotated(cache.key_quantizer, query / weight)
    np.testing.assert_allclose(got.query, want, atol=1e-5)
    np.testing.assert_allclose(got.bias, 0.3 * jnp.sum(query * mean, axis=-1), rtol=1e-5)
    if bits == 3:
        sketch = sketch_query(cache.key_quantizer, want) * sketch_gain(128)
        np.testing.assert_allclose(got.sketch, sketch, atol=1e-5)
    assert got.table.tolist() == [[10 + i for i in range(10)], list(range(10))]
    assert got.lengths.tolist() == [90 - 44, 300 - 44]
    assert got.positions.tolist() == [[84, 85, 86], [293, 294, 295]]


@pytest.mark.parametrize("kind", ["mse", "prod", "full precision"])
def test_nothing_is_computed_between_the_kernels(kind):
    """Pools, exact slots and queries reach the kernels as they are, pools in another shape."""
    options = {"num_kv_heads": 8, "head_dim": 128, "max_tokens": 4096}
    spec = tq.CacheSpec.full_precision(**options)
    if kind != "full precision":
        spec = tq.CacheSpec(key=tq.QuantizerSpec(128, 3, kind=kind), value=tq.QuantizerSpec(128, 3.5), **options)
    cache = jax.eval_shape(lambda: tq.init_cache(spec, batch=4))
    plan = attention.attend_plan(cache.spec, LogitOptions(0.1, 30.0, 1000), interpret=False)
    shape = jax.ShapeDtypeStruct
    integers, sinks = shape((2,), jnp.int32), shape((32,), jnp.float32)

    def run(query, cache, lengths, rows, sinks):
        return attention._attend(query, cache, lengths, rows, None, sinks, None, plan=plan, chosen="triton")

    lowered = lower_for_cuda(run, shape((2, 1, 32, 128), jnp.bfloat16), cache, integers, integers, sinks)
    names = [kernel.name for kernel in triton_kernels(lowered)]
    assert names == (["prepare", "merge"] if kind == "full precision" else ["prepare", "decode", "merge"])
    assert set(re.findall(r"stablehlo\.(\w+)", lowered.as_text())) <= {"custom_call", "constant", "reshape"}


def test_limits_are_named():
    def attend(spec, **options):
        cache = tq.init_cache(spec, batch=1)
        query = jnp.zeros((1, 1, 4, spec.head_dim))
        return tq.attend(query, cache, implementation="triton", **options)

    full = functools.partial(tq.CacheSpec.full_precision, num_kv_heads=2, max_tokens=64)
    with pytest.raises(NotImplementedError, match="head dims .*, got 48"):
        attend(full(head_dim=48))
    with pytest.raises(NotImplementedError, match="that divide 64 or are a multiple of it, got page_size=96"):
        attend(make_spec(page_size=96), config=TileConfig(tile=64))
