"""Cases of the kernels around encoding: key statistics, moves of tokens out of the window and into it, hot blocks."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.append.hot_blocks_triton import HotBlocks, HotPlan, Requests, read_hot_blocks, update_hot_blocks
from pallas_kernels.append.statistics_triton import Observed, update_statistics
from pallas_kernels.append.whole_cache import AppendPlan, append_cache
from tq_jax.append import statistics_plan
from tq_jax.attention import arrays_of
from tq_jax.cache import from_storage, init_cache
from tq_jax.cache_spec import CacheSpec
from tq_jax.commands.gate.case import Case
from tq_jax.commands.gate.cases.decode import BATCH, KV_HEADS
from tq_jax.quantizer import QuantizerSpec, encoder

CHUNK = 256
"""Tokens per chunk."""


def cases() -> Iterator[Case]:
    """Yields the cases; the quick cases cover each class of code."""
    for dim in (64, 80, 128, 256):
        yield case(f"dim {dim}", dim, quick=dim == 128)
    yield case("one token", 128, tokens=1, quick=True)
    yield case("float32, no window", 128, dtype="float32", window=0, sink_tokens=0)
    for dim in (64, 80, 128, 256):
        yield statistics_case(dim, quick=dim == 128)
    yield hot_case("window and first tokens", 256, HotPlan(128, 4, 64, first=1, entries=4), quick=True)
    yield hot_case("window", 1024, HotPlan(1000, 0, 32, first=0, entries=33))
    yield hot_case("first tokens", 256, HotPlan(0, 4, 64, first=1, entries=1))


def case(name: str, dim: int, *, tokens: int = CHUNK, quick: bool = False, **cache: Any) -> Case:
    """Appends a chunk to a cache of two 4-bit quantizers.

    Args:
        name: What distinguishes the case.
        dim: Channels of a head.
        tokens: Tokens per row of the chunk.
        quick: Whether the case is compiled by default.
        **cache: Further fields of the cache's spec.
    """
    four = QuantizerSpec(dim, 4)
    spec = CacheSpec(KV_HEADS, dim, 8192, key=four, value=four, page_size=128, **cache)

    def parts() -> tuple[Any, ...]:
        made = init_cache(spec, batch=BATCH)
        arrays = dataclasses.replace(
            arrays_of(made),
            exact_keys=from_storage(spec, made.exact_keys).astype(spec.dtype),
            exact_values=from_storage(spec, made.exact_values).astype(spec.dtype),
            overflow=made.overflow.astype(jnp.uint8),
        )
        assert made.key_quantizer is not None and made.value_quantizer is not None
        return arrays, encoder(made.key_quantizer), encoder(made.value_quantizer)

    def run(keys: Any, values: Any, arrays: Any, key: Any, value: Any) -> Any:
        plan = AppendPlan(spec.sinks, spec.max_tokens)
        return append_cache(keys, values, arrays, plan, key=key, value=value)

    chunk = jax.ShapeDtypeStruct((BATCH, tokens, KV_HEADS, dim), jnp.dtype(spec.dtype))
    # The encode kernels have their own cases.
    return Case(name, run, (chunk, chunk, *jax.eval_shape(parts)), only=("leave", "enter"), donated=(2,), quick=quick)


def statistics_case(dim: int, *, quick: bool) -> Case:
    """Updates the key statistics of rows that get one token each."""
    spec = CacheSpec(KV_HEADS, dim, 8192, key=QuantizerSpec(dim, 4), value=QuantizerSpec(dim, 4))
    plan = statistics_plan(spec, interpret=False)

    def run(query: Any, keys: Any, integers: Any, cache: Any, statistics: Any) -> Any:
        observed = Observed(query, keys, integers, integers, cache.exact_keys, cache.length, cache.compressed)
        return update_statistics(observed, statistics, plan)

    shape = jax.ShapeDtypeStruct
    query = shape((BATCH, 1, 4 * KV_HEADS, dim), jnp.bfloat16)
    cache = jax.eval_shape(lambda: init_cache(spec, batch=BATCH))
    arguments = (query, shape((BATCH, 1, KV_HEADS, dim), jnp.uint16), shape((BATCH,), jnp.int32))
    statistics, others = cache.statistics, dataclasses.replace(cache, statistics=None)
    arguments = (*arguments, others, statistics)
    return Case(f"statistics, dim {dim}", run, arguments, only=("statistics",), donated=(4,), quick=quick)


def hot_case(name: str, requests: int, plan: HotPlan, *, quick: bool = False) -> Case:
    """Updates and reads the tables of blocks in full precision of a serving engine, for a number of requests."""
    blocks, tokens, columns = 20000, 12288, 512

    def shape(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    slots = requests * plan.entries
    tables = HotBlocks(
        counts=shape(2), clock=shape(2), hot=shape(blocks + 1), begun=shape(blocks + 1), owner=shape(slots + 1),
        used=shape(slots + 1), order=shape(slots), wanted=shape(requests * plan.padded), slots=shape(tokens),
        places=shape(tokens, 2), table=shape(requests, columns), lengths=shape(requests),
        exact=shape(requests, plan.entries), begin=shape(requests), packed=shape(requests), cold=shape(requests, 2),
    )  # fmt: skip
    given = Requests(shape(requests, columns), shape(requests), shape(tokens, 2))

    def run(requests: Requests, tables: HotBlocks) -> HotBlocks:
        return read_hot_blocks(requests, update_hot_blocks(requests, tables, plan), plan)

    kernels = [f"{step}_hot_blocks" for step in ("mark", "choose", "give", "place", "read")]
    return Case(f"hot blocks, {name}", run, (given, tables), only=kernels, donated=(1,), quick=quick)
