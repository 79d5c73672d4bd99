"""Prefill over packed pages: the Triton kernel, interpreted, against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.variants import VARIANTS, Variant, make_case, normalized, relative_error
from pallas_kernels.decode import LogitOptions, decode_attention
from pallas_kernels.decode.pages import empty_pages
from pallas_kernels.prefill import PrefillConfig, prefill_attention
from pallas_kernels.prefill.config import default_config, num_splits
from tq_jax import QuantizerSpec

SMALL = PrefillConfig(rows=32, tile=32, num_warps=4, programs=24)
QUICK = {"k4v4", "prod3 group2", "k2.5v3.5", "d80", "softcap bias", "count 5 window", "pages 256 float32"}
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]


def chunk_case(variant, count=9):
    """The variant with a chunk of queries, ragged in the pages: the chunk's first tokens see less than all of them."""
    return make_case(dataclasses.replace(variant, count=count))


def reference(case):
    return decode_attention(*case.arrays, **case.options, implementation="reference")


def prefill(case, config=SMALL):
    return prefill_attention(*case.arrays, **case.options, implementation="triton", config=config)


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_reference(name):
    case = chunk_case(VARIANTS[name])
    want, got = reference(case), prefill(case)
    assert relative_error(got, want) <= 1e-3
    np.testing.assert_array_equal(got.total > 0, want.total > 0)
    seen = np.asarray(want.total > 0)
    log_sum = np.asarray(want.peak + jnp.log(jnp.where(want.total > 0, want.total, 1.0)))
    np.testing.assert_allclose(np.asarray(got.peak)[seen], log_sum[seen], atol=2e-3)
    np.testing.assert_array_equal(np.asarray(got.peak)[~seen], np.asarray(want.peak)[~seen])


@pytest.mark.parametrize(
    "config",
    [PrefillConfig(16, 64, programs=1), PrefillConfig(64, 128, programs=10_000), PrefillConfig(256, 32)],
    ids=str,
)
def test_blocks_tiles_and_splits_do_not_matter(config):
    case = chunk_case(Variant(page_size=128, lengths=(257, 1, 0), group=3), count=11)
    assert relative_error(prefill(case, config), reference(case)) <= 1e-3


def test_running_twice_gives_the_same_bits():
    case = chunk_case(VARIANTS["k3v3"])
    first, second = prefill(case), prefill(case)
    np.testing.assert_array_equal(first.acc, second.acc)
    np.testing.assert_array_equal(first.peak, second.peak)


def test_queries_in_any_order_and_beyond_the_pages():
    """Every query has its own position; those of a chunk that is not in the pages yet see all of them."""
    case = chunk_case(Variant(lengths=(100, 33)))
    rng = np.random.default_rng(3)
    positions = rng.integers(-2, 140, case.options["positions"].shape).astype(np.int32)
    case = dataclasses.replace(case, options=case.options | {"positions": jnp.asarray(positions)})
    want, got = reference(case), prefill(case)
    assert relative_error(got, want) <= 1e-3
    np.testing.assert_array_equal(got.total > 0, want.total > 0)


@pytest.mark.parametrize("factor", [1e-20, 1e-4, 3e4])
def test_queries_of_any_size(factor):
    """Queries beyond the range of float16, with logits of the same size as ever."""
    case = chunk_case(Variant(lengths=(70,)))
    query, *rest = case.arrays
    scaled = dataclasses.replace(case, arrays=(query * factor, *rest))
    scaled = dataclasses.replace(scaled, options=case.options | {"options": LogitOptions(0.1 / factor)})
    case = dataclasses.replace(case, options=case.options | {"options": LogitOptions(0.1)})
    assert relative_error(prefill(scaled), reference(case)) <= 1e-3


@pytest.mark.parametrize("scale", [2e-4, 2e3])
def test_values_of_any_size(scale):
    """Norms near both ends of what float16 scales hold."""
    case = chunk_case(Variant(lengths=(70,)))
    query, pages, *rest = case.arrays
    values = dataclasses.replace(pages.values, scale=pages.values.scale * jnp.float16(scale))
    case = dataclasses.replace(case, arrays=(query, dataclasses.replace(pages, values=values), *rest))
    assert relative_error(prefill(case), reference(case)) <= 1e-3


def test_a_chunk_is_no_expanded_copy_of_the_prefix():
    """The kernel's only large arrays are the chunk's own."""
    case = chunk_case(Variant(lengths=(2000,), page_size=128, group=1), count=16)
    jaxpr = jax.make_jaxpr(lambda *arrays: prefill_attention(*arrays, **case.options, implementation="triton"))(
        *case.arrays
    )
    [call] = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "pallas_call"] or [None]
    chunk = case.arrays[0].size
    assert call is not None
    assert max(v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars) <= chunk * 132 * 3


def test_large_logits_of_one_key():
    case = chunk_case(Variant(lengths=(130,)))
    case = dataclasses.replace(case, options=case.options | {"options": LogitOptions(scale=8.0)})
    got = prefill(case)
    assert np.isfinite(normalized(got)).all()
    assert relative_error(got, reference(case)) <= 1e-2


def test_limits_and_errors():
    four = QuantizerSpec(64, 4)

    def call(key=four, value=four, *, heads=2, page=64, implementation="triton", **more):
        pages = empty_pages(2, 1, page, key.format, value.format)
        more = {"query": jnp.zeros((1, 9, heads, key.dim))} | more
        return prefill_attention(
            pages=pages, block_table=jnp.zeros((1, 2), jnp.int32), lengths=jnp.zeros(1, jnp.int32),
            positions=jnp.zeros((1, 9), jnp.int32), key_format=key.format, value_format=value.format,
            options=LogitOptions(1.0), implementation=implementation, **more,
        )  # fmt: skip

    for match, arguments in [
        ("head dims .*, got 48 and 48", {"key": QuantizerSpec(48, 4), "value": QuantizerSpec(48, 4)}),
        ("up to 16 query heads a KV head, got 17", {"heads": 17}),
        ("pages of a multiple of 32 tokens, got page_size=16", {"page": 16}),
        ("pages of a multiple of 128 tokens, got page_size=64", {"config": PrefillConfig(tile=128)}),
        ("keys of codebook formats, got GroupFormat", {"key": QuantizerSpec(64, 4, kind="group")}),
        ("values without a sketch", {"value": QuantizerSpec(64, 4, kind="prod")}),
        ("implementation='mosaic'; prefill_attention has: ", {"implementation": "mosaic"}),
    ]:
        with pytest.raises(NotImplementedError, match=match):
            call(**arguments)
    with pytest.raises(ValueError, match="expected queries with a multiple of 1 heads and dim 64, got"):
        call(query=jnp.zeros((1, 9, 2, 32)))
    with pytest.raises(ValueError, match="expected sketch_query exactly for Prod keys, got sketch_query=True"):
        call(sketch_query=jnp.zeros((1, 9, 2, 64)))
    for field, value in (("tile", 48), ("rows", 100), ("num_warps", 2)):
        with pytest.raises(ValueError, match=f"expected {field} in .*, got {field}={value}"):
            PrefillConfig(**{field: value})


def test_configurations():
    assert default_config(32, query_rows=1024).tile == 32
    assert default_config(128, query_rows=36).rows == 64
    assert num_splits(PrefillConfig(programs=264), blocks=64, capacity=32768) == 4
    assert num_splits(PrefillConfig(tile=64), blocks=1, capacity=128) == 2
