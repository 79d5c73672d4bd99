"""Every kernel on a GPU against the reference: the cases of the interpreted tests, twice each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from pallas_kernels.attention import decode_attention, prefill_attention
from pallas_kernels.attention.chunk import attend_chunk, attend_prompt
from pallas_kernels.attention.decode.launch_triton import config_for as decode_config
from pallas_kernels.attention.prefill.launch_triton import config_for as prefill_config
from pallas_kernels.encode import encode_pages
from pallas_kernels.layer import NormWeights, residual_norm, split_heads
from tests.kernels.cases import chunk as chunk_cases
from tests.kernels.cases import encode as encode_cases
from tests.kernels.cases import joint as joint_cases
from tests.kernels.cases import pages as page_cases
from tests.kernels.cases import whole_cache as cache_cases

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("jax_gpu")]

PREFILL_COUNT, PREFILL_TOLERANCE = 24, 2e-3
precise_or_not = pytest.mark.parametrize("precise", [False, True], ids=["default", "precise"])


def check_pages(case, run, tolerance):
    """Compares attention over pages with the reference, and two runs with each other.

    Args:
        case: Queries and pages.
        run: The kernel.
        tolerance: Largest relative error, as a function of the reference's result.
    """
    want = page_cases.decode_reference(case)
    got, again = run(case.arguments), run(case.arguments)
    jax.tree.map(np.testing.assert_array_equal, got, again)
    assert page_cases.relative_error(got, want) <= tolerance(want)


@precise_or_not
@pytest.mark.parametrize("name", page_cases.VARIANTS)
def test_decode(name, precise):
    variant = page_cases.VARIANTS[name]
    case = page_cases.make_case(variant)
    query, pages, *_ = case.arrays
    formats = case.options["key_format"], case.options["value_format"]
    config = dataclasses.replace(decode_config(query.shape, pages, *formats, precise=precise), programs=64)
    run = jax.jit(functools.partial(decode_attention, config=config, implementation="triton"))
    check_pages(case, run, lambda want: 1e-4 if precise else page_cases.tolerance(variant, want))


@pytest.mark.parametrize("name", page_cases.VARIANTS)
def test_prefill(name):
    case = page_cases.make_case(dataclasses.replace(page_cases.VARIANTS[name], count=PREFILL_COUNT))
    query, pages, *_ = case.arrays
    config = prefill_config(query.shape, pages, case.options["key_format"], case.options["value_format"])
    run = jax.jit(functools.partial(prefill_attention, config=config, implementation="triton"))
    check_pages(case, run, lambda want: PREFILL_TOLERANCE)


@precise_or_not
@pytest.mark.parametrize("name", cache_cases.CASES)
def test_attend(name, precise):
    """Attention over a whole cache."""
    case = cache_cases.CASES[name]
    run, query, cache = cache_cases.attend_case(case)
    got, again = (run(query, cache, implementation="triton", precise=precise) for _ in range(2))
    np.testing.assert_array_equal(got, again)
    want = run(query, cache, implementation="reference")
    assert cache_cases.relative_error(got, want) <= case.tolerance(precise=precise)


@pytest.mark.parametrize("shape", joint_cases.SHAPES)
@pytest.mark.parametrize("name", joint_cases.SPECS)
def test_joint_heads(name, shape):
    joint_cases.check_parity(name, shape)


@pytest.mark.parametrize("name", encode_cases.CASES)
def test_encode(name):
    """Only ties of float32 rounding differ from the reference, and few."""
    arrays = encode_cases.make_arrays(encode_cases.CASES[name])
    got, again, want = (
        jax.jit(functools.partial(encode_pages, **arrays.options, implementation=implementation))(
            arrays.keys, arrays.values, arrays.pages, arrays.slots
        )
        for implementation in ("triton", "triton", "reference")
    )
    jax.tree.map(np.testing.assert_array_equal, got, again)
    found = encode_cases.compare(arrays, got, want)
    assert not found.wrong
    assert found.ties <= max(2, 1e-4 * found.values)


FOUR = tq.QuantizerSpec(128, 4, search=True)
PROD, GROUP = tq.QuantizerSpec(128, 3, kind="prod"), tq.QuantizerSpec(128, 2, kind="group")
APPENDS = {
    "k4v4": tq.CacheSpec(2, 128, 400, FOUR, FOUR, window=40, page_size=64),
    "k4v4 float32, no window": tq.CacheSpec(2, 128, 400, FOUR, FOUR, window=0, sink_tokens=0, dtype="float32"),
    "prod3 group2": tq.CacheSpec(2, 128, 400, PROD, GROUP, window=130, page_size=64),
    "full precision": tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=128, max_tokens=400),
}
CHUNKS = [[1] * 3] * 3 + [[7, 3, 8]] * 7 + [[90, 1, 0], [1, 0, 1], [200, 150, 3], [8, 8, 8], [200, 200, 1]]
"""Tokens of three cache rows, appended in turn: the first chunks fix the statistics, the last ones do not fit."""


@pytest.mark.parametrize("name", APPENDS)
def test_append(name):
    """Counters and full-precision tokens are equal, statistics to rounding.

    Statistics that are rounded otherwise move keys over thresholds, so a small share of the packed bytes may differ.
    """
    found = again = want = tq.init_cache(APPENDS[name], 4)
    run = {how: jax.jit(functools.partial(tq.append, implementation=how)) for how in ("reference", "triton")}
    rows = jnp.asarray([3, 0, 1], jnp.int32)
    for seed, counts in enumerate(CHUNKS):
        shape = (5, 3, max(counts), 2, 128)
        k, v, *query = jax.random.normal(jax.random.key(seed), shape, APPENDS[name].dtype) + seed % 3
        options = {"query": jnp.concatenate(query, 2), "lengths": jnp.asarray(counts, jnp.int32), "rows": rows}
        want = run["reference"](want, k, v, **options)
        found, again = (run["triton"](cache, k, v, **options) for cache in (found, again))
    jax.tree.map(np.testing.assert_array_equal, found, again)
    for field in ("length", "compressed", "overflow", "exact_keys", "exact_values"):
        np.testing.assert_array_equal(getattr(found, field), getattr(want, field), err_msg=field)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found.statistics, want.statistics)
    for got, expected in zip(jax.tree.leaves(found.pages), jax.tree.leaves(want.pages), strict=True):
        if expected.dtype == jnp.uint8:
            assert np.mean(np.asarray(got != expected)) <= 2e-3


LARGE_POOL = 3 << 30
"""Bytes of a pool of packed keys whose offsets do not fit in signed 32 bits."""


@pytest.fixture
def large_gpu():
    """Skips a test if the GPU cannot hold two sets of large pools."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if limit < 24 << 30:
        pytest.skip(f"needs 24 GiB of GPU memory for JAX, got {limit / 2**30:.0f}")


def in_large_pools(pages):
    """Pages behind so many others that the pool of keys is large, and the number of those others."""
    pool = pages.keys.packed
    before = LARGE_POOL // (pool.nbytes // pool.shape[0])
    return jax.tree.map(lambda x: jnp.pad(x, ((before, 0), *((0, 0),) * (x.ndim - 1))), pages), before


# One test for all formats of an operation: a process keeps the memory that it once had, and eight run at once.
@pytest.mark.usefixtures("large_gpu")
@pytest.mark.parametrize("count", [1, PREFILL_COUNT])
def test_attention_over_large_pools(count):
    """Equal, bit for bit, to attention over the same pages in small pools."""
    attend = decode_attention if count == 1 else prefill_attention
    for name in ("k4v4", "k2v2", "prod3 group2"):
        case = page_cases.make_case(dataclasses.replace(page_cases.VARIANTS[name], count=count))
        given = case.arguments
        run = jax.jit(functools.partial(attend, implementation="triton"))
        want = run(given)
        larger, before = in_large_pools(given.pages)
        got = run(dataclasses.replace(given, pages=larger, block_table=given.block_table + before))
        jax.tree.map(np.testing.assert_array_equal, got, want)
        del larger


@pytest.mark.usefixtures("large_gpu")
def test_encode_into_large_pools():
    """Equal, byte for byte, to encoding into the same pages in small pools."""
    for name in ("k4v4", "prod3 group2"):
        arrays = encode_cases.make_arrays(encode_cases.CASES[name])
        run = jax.jit(functools.partial(encode_pages, **arrays.options, implementation="triton"))
        want = run(arrays.keys, arrays.values, arrays.pages, arrays.slots)
        larger, before = in_large_pools(arrays.pages)
        moved = before * arrays.pages.keys.packed.shape[2]
        slots = jnp.where(arrays.slots < 0, arrays.slots, arrays.slots + moved)
        got = run(arrays.keys, arrays.values, larger, slots)
        for found, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(found[before:], expected)
        del larger, got, found


@pytest.mark.parametrize("implementation", ["auto", "triton"])
@pytest.mark.parametrize("name", chunk_cases.CASES)
def test_chunk(name, implementation):
    """Attention within a prompt, by cuDNN where it takes the case, and by the kernel."""
    arrays, options = chunk_cases.make_chunk(chunk_cases.CASES[name])
    for attend in (attend_prompt, attend_chunk):
        got, again = (attend(*arrays, options=options, implementation=implementation) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, got, again)
        want = attend(*arrays, options=options, implementation="reference")
        chunk_cases.close(got, want, arrays[0].dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer(dtype):
    """The small kernels of a decoder layer."""
    joint, hidden, added, scale, norm = (
        jax.random.normal(jax.random.key(i), shape).astype(dtype)
        for i, shape in enumerate(((3, 5, 2, 6, 128), (3, 5, 576), (3, 5, 576), (576,), (128,)))
    )
    angles = jax.random.normal(jax.random.key(9), (3, 5, 64))
    tolerance = 1e-5 if dtype == "float32" else 2**-6
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    for centered in (False, True):
        weights = NormWeights(norm, 1e-5, centered)
        found = []
        for implementation in ("triton", "reference"):
            heads = split_heads(
                joint,
                (jnp.cos(angles), jnp.sin(angles)),
                query_norm=weights,
                key_norm=weights,
                implementation=implementation,
            )
            normed = residual_norm(hidden, added, NormWeights(scale, 1e-5, centered), implementation=implementation)
            found.append(jax.tree.map(lambda x: x.astype(jnp.float32), (heads, normed)))
        jax.tree.map(close, *found)
