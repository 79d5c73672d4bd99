"""Cases of the kernels before and after decode: types, head dims, rotations and masks, but not every combination."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import (
    MAX_QUERY_TOKENS,
    FullPrecisionBlocks,
    LogitOptions,
    PagedArrays,
    TileConfig,
    attend_block_table,
    whole_cache,
)
from pallas_kernels.attention.decode.launch_triton import config_for
from pallas_kernels.attention.exact import is_light
from pallas_kernels.layer import JointHeads, NormWeights
from tq_jax.attention import arrays_of, attend_plan
from tq_jax.cache import init_cache
from tq_jax.cache_spec import CacheSpec
from tq_jax.commands.gate.case import Case, by_tiles
from tq_jax.commands.gate.cases.decode import BATCH, EVERYTHING, KV_HEADS, PLAIN
from tq_jax.quantizer import QuantizerSpec


def cases() -> Iterator[Case]:
    """Yields the cases; the quick cases cover each class of code."""
    spec = QuantizerSpec
    for dim in (64, 80, 96, 128, 192, 256):
        yield case(f"dim {dim}", spec(dim, 4), spec(dim, 4), quick=dim in (80, 128, 256))
    four = spec(128, 4)
    yield case("float32", four, four, query=jnp.float32, dtype="float32", quick=True)
    for dtype in ("float16", "float32"):
        yield case(f"{dtype}, 8 queries", four, four, query=jnp.dtype(dtype), dtype=dtype, count=8)
    yield case("haar", *[spec(128, 4, rotation="haar")] * 2, query=jnp.float16, dtype="float16")
    yield case("K2.5/V3.5", spec(128, 2.5), spec(128, 3.5), quick=True)
    yield case("prod 3, min-max 2", spec(128, 3, kind="prod"), spec(128, 2, kind="group"), quick=True)
    yield case("no statistics", four, four, center_keys=False, smooth_keys=False)
    yield case("no window", four, four, window=0, sink_tokens=0)
    yield case("group 16", four, four, group=16)
    yield case(
        "8 queries, sink logits, window, soft-cap", four, four, count=8, options=EVERYTHING, sinks=True, quick=True
    )
    for dim in (64, 80, 128, 256):
        yield case(f"new tokens, dim {dim}", spec(dim, 4), spec(dim, 4), new=True, quick=dim == 128)
    yield case("8 new tokens, window, soft-cap", four, four, count=8, options=EVERYTHING, new=True, quick=True)
    yield case("new tokens, float32", four, four, query=jnp.float32, dtype="float32", new=True)
    for bits in (2, 3, 4, 8):
        yield case(
            f"K{bits}/V{min(bits, 4)}, pages of 256", spec(128, bits), spec(128, min(bits, 4)), new=True, page=256
        )
    for dim in (64, 80, 128, 256):
        yield from blocks_cases(f"blocks, dim {dim}", spec(dim, 4), quick=dim in (64, 128))
    yield from blocks_cases("blocks, float16", four, query=jnp.float16, stored=jnp.float16)
    yield from blocks_cases("blocks, float32", four, query=jnp.float32, stored=jnp.float32, quick=True)
    yield from blocks_cases("blocks, 8 queries, window, soft-cap", four, count=8, options=EVERYTHING, quick=True)
    for count in (2, 4, 8):
        yield from blocks_cases(f"blocks, {count} queries", four, count=count, quick=count == 4)
    yield from blocks_cases("blocks, 512 queries", four, count=512, quick=True)
    for bits in (2, 3, 8):
        yield from blocks_cases(f"blocks, K{bits}", spec(128, bits))
    for dim in (64, 128):
        yield joint_case(f"heads, dim {dim}", spec(dim, 4), norms=dim == 128, quick=True)
    yield joint_case("heads, K3.5", spec(128, 3.5), norms=True)
    yield joint_case("heads, 8 queries, prod 3", spec(128, 3, kind="prod"), count=8, quick=True)


def case(
    name: str,
    key: QuantizerSpec,
    value: QuantizerSpec,
    *,
    group: int = 4,
    count: int = 1,
    options: LogitOptions = PLAIN,
    query: Any = jnp.bfloat16,
    sinks: bool = False,
    new: bool = False,
    page: int = 128,
    quick: bool = False,
    **cache: Any,
) -> Case:
    """Attention over a cache of two quantizers.

    Args:
        name: What distinguishes the case.
        key: Key quantizer.
        value: Value quantizer.
        group: Query heads per KV head.
        count: Query tokens.
        options: Logit options.
        query: Type of the queries.
        sinks: Whether there are sink logits.
        new: Whether the cache does not hold the queries' own tokens yet.
        page: Tokens per page.
        quick: Whether the case is compiled by default.
        **cache: Further fields of the cache's spec.
    """
    spec = CacheSpec(KV_HEADS, key.dim, 8192, key=key, value=value, page_size=page, **cache)
    plan = attend_plan(spec, options, interpret=False)
    shape = jax.ShapeDtypeStruct
    heads = KV_HEADS * group

    def run(query: Any, cache: Any, rows: Any, counts: Any, sink_logits: Any, chunk: Any) -> Any:
        back = None if chunk is None else jnp.zeros_like(counts)
        return whole_cache.attend_cache(
            query, arrays_of(cache), plan, rows=rows, counts=counts, sink_logits=sink_logits, new=chunk, back=back
        )

    integers = shape((BATCH,), jnp.int32)
    token = shape((BATCH, count, KV_HEADS, key.dim), query)
    cache_shape = jax.eval_shape(lambda: init_cache(spec, batch=BATCH))
    arguments = (
        shape((BATCH, count, heads, key.dim), query),
        cache_shape,
        integers,
        integers,
        shape((heads,), jnp.float32) if sinks else None,
        (token, token) if new else None,
    )
    # Decode kernels for pages alone have their own cases.
    light = is_light(query, cache_shape.exact_keys.dtype, key.dim, key.format, value.format)
    decode = ["decode"] * (light and (new or cache_shape.exact_keys.size > 0))
    return Case(name, run, arguments, only=("prepare", *decode, "merge"), quick=quick)


def blocks_cases(
    name: str,
    key: QuantizerSpec,
    *,
    count: int = 1,
    options: LogitOptions = PLAIN,
    query: Any = jnp.bfloat16,
    stored: Any = jnp.uint16,
    quick: bool = False,
) -> Iterator[Case]:
    """Attention over pages of 64 tokens and blocks in full precision: a first one and those of 128 latest tokens.

    Args:
        name: What distinguishes the case.
        key: Key quantizer.
        count: Query tokens.
        options: Logit options.
        query: Type of the queries.
        stored: Type of the blocks.
        quick: Whether the case is compiled by default.
    """
    page, entries, value = 64, 4, QuantizerSpec(key.dim, 4)
    spec = CacheSpec(KV_HEADS, key.dim, 8192, key=key, value=value, page_size=page, window=0, sink_tokens=0)
    plan = dataclasses.replace(attend_plan(spec, options, interpret=False), sink_slots=page)
    shape = jax.ShapeDtypeStruct

    def run(query: Any, cache: Any, pools: Any, table: Any, lengths: Any, blocks: Any, config: Any) -> Any:
        held = arrays_of(cache)
        assert held.pages is not None
        arrays = PagedArrays(held.pages, held.key_basis, held.value_basis, held.sketch, *pools)
        return attend_block_table(
            query,
            arrays,
            table,
            lengths,
            dataclasses.replace(plan, config=config),
            statistics=(held.mean, held.weight),
            segment=FullPrecisionBlocks(*blocks),
        )

    integers, asked = shape((BATCH,), jnp.int32), shape((BATCH, count, KV_HEADS * 4, key.dim), query)
    pool = shape((BATCH * entries * page, KV_HEADS, key.dim), stored)
    cache_shape = jax.eval_shape(lambda: init_cache(spec, batch=BATCH))
    arguments = (
        asked,
        cache_shape,
        (pool, pool),
        shape((BATCH, 8192 // page), jnp.int32),
        integers,
        (shape((BATCH, entries), jnp.int32), integers, integers),
    )
    few = count <= MAX_QUERY_TOKENS
    light = few and is_light(query, stored, key.dim, key.format, value.format)

    def tiles(capability: int) -> TileConfig | None:
        given = asked.shape, cache_shape.pages, key.format, value.format
        return config_for(*given, capability=capability) if few else None

    for config, architectures in by_tiles(tiles).items():
        yield Case(
            name if "sm_90" in architectures else f"{name}, {', '.join(architectures)}",
            functools.partial(run, config=config),
            arguments,
            only=("prepare", *["decode"] * light, "merge"),
            architectures=architectures,
            quick=quick,
        )


def joint_case(
    name: str, key: QuantizerSpec, *, norms: bool = False, count: int = 1, group: int = 4, quick: bool = False
) -> Case:
    """Attention of the queries that a joint product makes.

    Args:
        name: What distinguishes the case.
        key: Key quantizer.
        norms: Whether heads have norms.
        count: Query tokens.
        group: Query heads per KV head.
        quick: Whether the case is compiled by default.
    """
    spec = CacheSpec(KV_HEADS, key.dim, 8192, key=key, value=QuantizerSpec(key.dim, 4), page_size=128)
    plan = attend_plan(spec, PLAIN, interpret=False)
    shape = jax.ShapeDtypeStruct

    def run(product: Any, turn: Any, scale: Any, cache: Any, counts: Any) -> Any:
        norm = None if scale is None else NormWeights(scale, 1e-5)
        joint = JointHeads(product, turn, norm, norm)
        return whole_cache.attend_cache_joint(joint, arrays_of(cache), plan, counts=counts)

    factor = shape((BATCH, count, key.dim // 2), jnp.float32)
    arguments = (
        shape((BATCH, count, KV_HEADS, group + 2, key.dim), jnp.bfloat16),
        (factor, factor),
        shape((key.dim,), jnp.bfloat16) if norms else None,
        jax.eval_shape(lambda: init_cache(spec, batch=BATCH)),
        shape((BATCH,), jnp.int32),
    )
    return Case(name, run, arguments, only=("prepare",), quick=quick)
