"""Attention of a long chunk over a whole cache, in JAX: two kernels of decoding around the one for long chunks."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import LogitOptions, whole_cache
from pallas_kernels.attention.full_precision_triton import LOG2_E
from pallas_kernels.attention.merge_triton import MergeInputs, Splits, merge_plan, merge_splits
from pallas_kernels.attention.prefill import launch_triton
from pallas_kernels.attention.prepare_triton import Prepared
from pallas_kernels.format import VectorFormat
from pallas_kernels.pages import Pages


def attend_chunk(
    query: jax.Array, cache: whole_cache.CacheArrays, plan: whole_cache.AttendPlan, *, sink_logits: Any, counts: Any
) -> Any:
    """What `whole_cache.attend_cache` computes, for any number of query tokens; arguments as there.

    Raises:
        NotImplementedError: For shapes or formats outside the kernels' limits.
    """
    if cache.pages is None:
        return whole_cache.attend_cache(query, cache, plan, sink_logits=sink_logits, counts=counts)
    assert plan.key_format is not None and plan.value_format is not None
    prepared = whole_cache.prepare_cache(query, cache, plan, None, counts)
    packed = packed_splits(
        prepared, cache.pages, plan.key_format, plan.value_format, options=plan.options, interpret=plan.interpret
    )
    exact = None if prepared.acc is None else Splits(prepared.acc, prepared.peak, prepared.total)
    merging = merge_plan(
        query.shape, splits=1, dtype=jnp.dtype(query.dtype).name, partial=False, interpret=plan.interpret
    )
    inputs = MergeInputs(packed, exact, cache.value_basis, sink_logits, None, counts, cache.overflow)
    return merge_splits(inputs, merging)[0]


def packed_splits(
    prepared: Prepared,
    pages: Pages,
    key_format: VectorFormat,
    value_format: VectorFormat,
    *,
    options: LogitOptions,
    interpret: bool,
) -> Splits:
    """Attention of prepared queries, of any number, over the pages of a block table, as one split.

    Args:
        prepared: What `prepare` wrote.
        pages: The pools.
        key_format: Of keys.
        value_format: Of values.
        options: Logit options.
        interpret: Whether the kernel runs as jnp.

    Raises:
        NotImplementedError: For shapes or formats outside the kernel's limits.
    """
    found = launch_triton.attend_pages(
        prepared.query,
        pages,
        prepared.table,
        prepared.lengths,
        positions=prepared.positions,
        key_format=key_format,
        value_format=value_format,
        options=options,
        logit_bias=prepared.bias,
        sketch_query=prepared.sketch,
        interpret=interpret,
    )
    heads = pages.keys.packed.shape[1]
    return Splits(*(_one_split(x, heads) for x in (found.acc, found.peak * LOG2_E, found.total)))


def _one_split(x: jax.Array, kv_heads: int) -> jax.Array:
    """[b, t, h_q, ...] as [b, h_kv, 1, t * g, ...], as splits lie."""
    batch, count, heads, *rest = x.shape
    x = x.reshape(batch, count, kv_heads, heads // kv_heads, *rest).swapaxes(1, 2)
    return x.reshape(batch, kv_heads, 1, count * heads // kv_heads, *rest)
