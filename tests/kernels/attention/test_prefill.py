"""Prefill over packed pages: the Triton kernel, interpreted, against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from pallas_kernels.attention import (
    LogitOptions,
    PagedArguments,
    PrefillConfig,
    prefill_attention,
)
from pallas_kernels.attention.prefill.config import default_config, num_splits
from pallas_kernels.attention.prefill.launch_triton import attend_pages, config_for
from pallas_kernels.compat.lowering import lower_for_cuda, triton_kernels
from pallas_kernels.pages import empty_pages
from tests.kernels.cases.pages import VARIANTS, Variant, decode_reference, make_case, normalized, relative_error
from tq_jax import QuantizerSpec

SMALL = PrefillConfig(rows=32, tile=32, num_warps=4, programs=24)
QUICK = {"prod3 group2", "prod1 v3", "k2.5v3.5", "d80", "softcap bias", "count 5 window", "pages 16"}
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]


def chunk_case(variant, count=9):
    """The variant with a chunk of queries that is in the pages itself: its first queries do not see all tokens."""
    return make_case(dataclasses.replace(variant, count=count))


def prefill(case, config=SMALL):
    """The kernel's result, the same in two runs."""
    run = jax.jit(lambda x: prefill_attention(x, implementation="triton", config=config))
    first, second = run(case.arguments), run(case.arguments)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    return first


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_reference(name):
    case = chunk_case(VARIANTS[name])
    want, got = decode_reference(case), prefill(case)
    assert relative_error(got, want) <= 1e-3
    np.testing.assert_array_equal(got.total > 0, want.total > 0)
    seen = np.asarray(want.total > 0)
    log_sum = np.asarray(want.peak + jnp.log(jnp.where(want.total > 0, want.total, 1.0)))
    np.testing.assert_allclose(np.asarray(got.peak)[seen], log_sum[seen], atol=2e-3)
    np.testing.assert_array_equal(np.asarray(got.peak)[~seen], np.asarray(want.peak)[~seen])


@pytest.mark.parametrize(
    "config", [PrefillConfig(64, 128, programs=10_000), PrefillConfig(256, 64, programs=1)], ids=str
)
def test_blocks_tiles_and_splits_do_not_matter(config):
    case = chunk_case(Variant(page_size=128, lengths=(257, 1, 0), group=3), count=11)
    assert relative_error(prefill(case, config), decode_reference(case)) <= 1e-3


def test_queries_in_any_order_and_beyond_the_pages():
    """Every query has its own position; queries that come after the pages see all of their tokens."""
    case = chunk_case(Variant(lengths=(100, 33)))
    rng = np.random.default_rng(3)
    positions = rng.integers(-2, 140, case.options["positions"].shape).astype(np.int32)
    case = dataclasses.replace(case, options=case.options | {"positions": jnp.asarray(positions)})
    want, got = decode_reference(case), prefill(case)
    assert relative_error(got, want) <= 1e-3
    np.testing.assert_array_equal(got.total > 0, want.total > 0)


def test_queries_and_values_of_any_size():
    """Queries beyond the range of float16, and values near both ends of what float16 scales hold."""
    case = chunk_case(Variant(lengths=(70,)))
    query, pages, *rest = case.arrays
    query = 3e4 * query * jnp.where(jnp.arange(9) % 2, 1e-20, 1.0)[None, :, None, None]
    sizes = jnp.array([2e-4, 2e3], jnp.float16)[None, :, None]
    values = dataclasses.replace(pages.values, scale=pages.values.scale * sizes)
    options = case.options | {"options": LogitOptions(0.1 / 3e4)}
    case = dataclasses.replace(case, arrays=(query, dataclasses.replace(pages, values=values), *rest), options=options)
    got, want = normalized(prefill(case)), normalized(decode_reference(case))
    for head in (slice(0, 4), slice(4, 8)):
        error = np.linalg.norm(got[:, :, head] - want[:, :, head]) / np.linalg.norm(want[:, :, head])
        assert error <= 1e-3


def test_no_expanded_copy_of_the_prefix():
    """All arrays outside of the kernel are of the chunk's size, but for the pools in another shape."""
    spec, shape = QuantizerSpec(64, 4).format, jax.ShapeDtypeStruct
    pages = jax.eval_shape(lambda: empty_pages(512, 1, 128, spec, spec))

    def attend(query, pages, table, lengths, positions):
        arguments = PagedArguments(query, pages, table, lengths, positions, spec, spec, LogitOptions(1.0))
        return prefill_attention(arguments, implementation="triton", config=PrefillConfig(rows=16, programs=2))

    integers = [shape(s, jnp.int32) for s in ((1, 512), (1,), (1, 16))]
    jaxpr = jax.make_jaxpr(attend)(shape((1, 16, 1, 64), jnp.float32), pages, *integers).jaxpr
    assert [e for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
    made = [e for e in jaxpr.eqns if e.primitive.name != "reshape"]
    assert max(v.aval.size for e in made for v in e.outvars) <= 2 * 16 * 64


@pytest.mark.slow
def test_chunks_of_a_cache():
    """A chunk whose first tokens have left the window already, over the tokens before it."""
    spec = tq.CacheSpec(
        1, 64, 256, key=QuantizerSpec(64), value=QuantizerSpec(64), window=8, sink_tokens=2, page_size=64
    )
    rng = np.random.default_rng(0)
    k, v, more_k, more_v = (jnp.asarray(rng.standard_normal((1, t, 1, 64)), jnp.float32) for t in (90, 90, 12, 12))
    cache = tq.append(tq.append(tq.init_cache(spec, batch=1), k, v), more_k, more_v)
    query = jnp.asarray(rng.standard_normal((1, 12, 2, 64)), jnp.float32)
    assert "name=prefill" in str(jax.make_jaxpr(lambda q: tq.attend(q, cache, implementation="triton"))(query))
    got, want = (tq.attend(query, cache, implementation=name) for name in ("triton", "reference"))
    np.testing.assert_allclose(got, want, atol=1e-3 * float(jnp.max(jnp.abs(want))))


@pytest.mark.parametrize("name", ["k4v4", "prod2 group4", "k2.5v3.5", "softcap bias"])
def test_lowers_for_cuda(name):
    """The kernel as a GPU runs it: inline PTX, which interpretation leaves out, and operands that it accepts."""
    case = chunk_case(dataclasses.replace(VARIANTS[name], lengths=(40,), page_size=64))
    query, pages, *_ = case.arrays
    config = config_for(query.shape, pages, case.options["key_format"], case.options["value_format"])

    def run(arguments):
        return attend_pages(arguments, config=config, interpret=False)

    [kernel] = triton_kernels(lower_for_cuda(run, case.arguments))
    assert kernel.name == "prefill" and kernel.ir.count("tt.dot") >= 4


def test_large_logits_of_one_key():
    case = chunk_case(Variant(lengths=(130,)))
    case = dataclasses.replace(case, options=case.options | {"options": LogitOptions(scale=8.0)})
    got = prefill(case)
    assert np.isfinite(normalized(got)).all()
    assert relative_error(got, decode_reference(case)) <= 1e-2


def test_limits_and_errors():
    four = QuantizerSpec(64, 4)

    def call(key=four, value=four, *, query=None, heads=2, page=64, implementation="triton", config=None, **more):
        pages = empty_pages(2, 1, page, key.format, value.format)
        query = jnp.zeros((1, 9, heads, key.dim)) if query is None else query
        arguments = PagedArguments(
            query, pages, block_table=jnp.zeros((1, 2), jnp.int32), lengths=jnp.zeros(1, jnp.int32),
            positions=jnp.zeros((1, 9), jnp.int32), key_format=key.format, value_format=value.format,
            options=LogitOptions(1.0), **more,
        )  # fmt: skip
        return prefill_attention(arguments, implementation=implementation, config=config)

    for match, arguments in [
        ("head dims .*, got 48 and 48", {"key": QuantizerSpec(48, 4), "value": QuantizerSpec(48, 4)}),
        ("up to 16 query heads per KV head, got 17", {"heads": 17}),
        ("pages of a multiple of 16 tokens that divide .*, got page_size=40", {"page": 40}),
        (
            "pages of a multiple of 16 tokens that divide 64 .*, got page_size=96",
            {"page": 96, "config": PrefillConfig()},
        ),
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
    """Tiles fit pages and the device: they are larger where products take operands from shared memory."""
    assert default_config(96, query_rows=1024).tile == 32
    assert default_config(16, query_rows=1024).tile == 32
    assert default_config(128, query_rows=36) == PrefillConfig(64, 64, 4, 2, 528)
    rows = {
        capability: default_config(128, query_rows=1024, capability=capability).rows for capability in (80, 90, 100)
    }
    assert rows == {80: 64, 90: 256, 100: 128}
    assert num_splits(PrefillConfig(programs=264), blocks=64, capacity=32768) == 4
    assert num_splits(PrefillConfig(tile=64), blocks=1, capacity=128) == 2


def test_tiles_of_formats():
    """Formats that take more registers take smaller tiles."""

    def tile(key, value):
        pages = jax.eval_shape(lambda: empty_pages(2, 1, 128, key.format, value.format))
        return config_for((1, 256, 4, key.dim), pages, key.format, value.format).tile

    four = QuantizerSpec(128, 4)
    assert tile(four, four) == 64
    for other in (QuantizerSpec(128, 2), QuantizerSpec(128, 2.5), QuantizerSpec(128, 2, kind="group")):
        assert tile(four, other) == 32
    assert default_config(128, query_rows=1024, heavy=True, mixed=True, capability=120).num_stages == 3
    assert default_config(128, query_rows=1024, heavy=True, mixed=True, capability=90).num_stages == 2
    assert default_config(128, query_rows=1024, heavy=True, capability=120).num_stages == 2
