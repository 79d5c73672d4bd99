"""Attention over block tables by kernels, interpreted: a cache's own arrays, its pages shuffled, give what it gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from pallas_kernels.attention import FullPrecisionSegment, LogitOptions, PagedArrays, attend_block_table
from tests.kernels.cases.whole_cache import filled_cache, make_spec, relative_error
from tq_jax.attention import arrays_of, attend_plan


def shuffled(cache, seed=0):
    """The cache's pages in another order, and the block table that says where they are."""
    order = np.random.default_rng(seed).permutation(cache.pages.keys.packed.shape[0])
    place = jnp.asarray(np.argsort(order).reshape(cache.rows, -1), jnp.int32)
    return jax.tree.map(lambda pool: pool[order], cache.pages), place


def attend(query, cache, *, segment, counts=None, **options):
    """Attention over the shuffled pages of a cache, and over its full-precision slots if it has some."""
    logits = LogitOptions.for_head_dim(cache.spec.head_dim, scale=None, softcap=None, sliding_window=None)
    plan = attend_plan(cache.spec, logits, precise=True, interpret=True)
    arrays, (pages, table) = arrays_of(cache), shuffled(cache)
    held = FullPrecisionSegment(arrays.exact_keys, arrays.exact_values, cache.compressed) if segment else None
    paged = PagedArrays(pages, arrays.key_basis, arrays.value_basis, arrays.sketch)
    statistics = None if arrays.mean is None else (arrays.mean, arrays.weight)
    return attend_block_table(
        query, paged, table, cache.length, plan, counts=counts, statistics=statistics, segment=held, **options
    )


@pytest.mark.sampled
@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_window_beside_the_pages(count, dtype):
    """Sink slots and a ring beside shuffled pages: the tokens of a whole cache, in ragged rows."""
    cache, query = filled_cache(make_spec(64, dtype=dtype), (200, 47, 9), group=2)
    counts = jnp.asarray([count, count, min(count, 5)], jnp.int32)
    query = query[:, :count]
    got = attend(query, cache, segment=True, counts=counts)
    want = tq.attend(query, cache, lengths=counts, implementation="reference")
    assert relative_error(got, want) <= 2e-3
    np.testing.assert_array_equal(got, attend(query, cache, segment=True, counts=counts))


@pytest.mark.parametrize("count", [1, 12])
def test_every_token_in_pages(count):
    """Without a segment all tokens are read from their codes."""
    cache, query = filled_cache(make_spec(64, window=0, sink_tokens=0), (200, 33), group=2)
    sinks = jnp.linspace(-1.0, 2.0, query.shape[2])
    got = attend(query[:, :count], cache, segment=False, sink_logits=sinks)
    want = tq.attend(query[:, :count], cache, sink_logits=sinks, implementation="reference")
    assert relative_error(got, want) <= 2e-3


def test_sink_slots_need_a_segment():
    cache, query = filled_cache(make_spec(64), (90,), group=2)
    with pytest.raises(ValueError, match="expected sink_slots=0 without a full-precision segment, got 4"):
        attend(query[:, :1], cache, segment=False)
