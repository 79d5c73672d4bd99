"""The kernels around encoding, interpreted, against `tq_jax.append` on the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from pallas_kernels.append import AppendPlan, append_cache
from pallas_kernels.encode import encode_pages
from pallas_kernels.encode import triton as encode
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
    """What `append_cache` makes of a cache."""
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


def reference(keys, values, pages, slots, *, interpret, **options):
    assert interpret
    return encode_pages(keys, values, pages, slots, implementation="reference", **options)


QUICK = {"window and sinks", "neither"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SPECS])
def test_the_bytes_of_append(name, monkeypatch):
    """Chunks longer and shorter than the window, ragged, single, with NaN behind the end, beyond the room."""
    monkeypatch.setattr(encode, "encode_pages", reference)
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


def _statistics(spec: tq.CacheSpec):
    if not spec.has_statistics:
        return None
    mean, weight = np.random.default_rng(9).standard_normal((2, spec.num_kv_heads, spec.head_dim)).astype(np.float32)
    return jnp.asarray(mean), jnp.asarray(np.exp(weight))
