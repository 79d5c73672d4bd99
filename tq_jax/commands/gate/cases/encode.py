"""Cases of the encode kernels: every format, head dim and kind of rotation, but not every combination."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.encode import launch_triton
from pallas_kernels.encode.arguments import EncodeArguments, ExactTokens
from pallas_kernels.encode.config import default_config, takes_one_token
from pallas_kernels.pages import empty_pages
from tq_jax.commands.gate.case import Case
from tq_jax.commands.gate.cases.decode import BATCH, KV_HEADS, LARGE, PAGE_SIZE, PAGES, in_blocks
from tq_jax.quantizer import QuantizerSpec, encoder, make_quantizer

TOKENS = 4096


def cases() -> Iterator[Case]:
    """Yields the cases; the quick cases cover each class of tiles and of code."""
    spec = QuantizerSpec
    for bits in (1, 2, 3, 4, 5, 8):
        yield case(f"V{bits}", spec(128, bits), quick=bits == 4)
        if bits > 1:
            searching = spec(128, bits, search=True, scale="unbiased")
            yield case(f"K{bits} search", searching, keys=True)
    for dim in (64, 80, 96, 192, 256):
        yield case(f"K4 search dim {dim}", spec(dim, 4, search=True), keys=True)
        yield case(f"V3 dim {dim}", spec(dim, 3))
    for bits in (2.5, 3.5):
        yield case(f"V{bits} search", spec(128, bits, search=True))
    for bits in (1, 2, 3, 4, 5):
        yield case(f"prod {bits}", spec(128, bits, kind="prod"), keys=True, quick=bits == 3)
    for dim in (64, 80, 96, 192, 256):
        yield case(f"prod 3 dim {dim}", spec(dim, 3, kind="prod"), keys=True)
    yield case("prod 4 search", spec(128, 4, kind="prod", scale="unbiased", search=True), keys=True)
    yield case("prod 4 haar", spec(128, 4, kind="prod", rotation="haar"), keys=True)
    yield case("min-max 2", spec(128, 2, kind="group"), quick=True)
    yield case("K4 haar", spec(128, 4, rotation="haar"), keys=True)
    yield case("V4, pools of 3 GiB", spec(128, 4), pages=BATCH * LARGE)
    for bits in (2, 3, 4):
        yield together(bits, quick=bits == 4)
        yield together(bits, quick=bits == 4, blocks=True)
        yield together(bits, quick=False, rows=4096, blocks=True)
    for dim in (64, 256):
        yield case(f"V3 dim {dim}, 32 rows", spec(dim, 3), rows=32, tokens=1)
    for rows in (32, 512):
        yield case(f"V4 search, {rows} rows", spec(128, 4, search=True), rows=rows, tokens=1, quick=rows == 32)
    for bits in (5, 8):
        yield case(f"K{bits} search, 32 rows", spec(128, bits, search=True), keys=True, rows=32, tokens=1)


def case(
    name: str,
    spec: QuantizerSpec,
    *,
    keys: bool = False,
    rows: int = 1,
    tokens: int = TOKENS,
    pages: int = PAGES,
    quick: bool = False,
) -> Case:
    """Encodes bfloat16 vectors into pages.

    Args:
        name: What distinguishes the case.
        spec: Quantizer of the vectors.
        keys: Whether the vectors are keys, which are centred and weighted.
        rows: Rows of the batch.
        tokens: Tokens per row.
        pages: Pages of the pool.
        quick: Whether the case is compiled by default.
    """
    shape = jax.ShapeDtypeStruct
    pools = jax.eval_shape(lambda: empty_pages(pages, KV_HEADS, PAGE_SIZE, spec.format, spec.format))
    encoded = jax.eval_shape(lambda: encoder(make_quantizer(spec)))
    flat = tokens < launch_triton.LEAST_ROW
    config = default_config(rows * tokens if flat else tokens, encoded, single=flat and takes_one_token(encoded))
    statistics = shape((rows, KV_HEADS, spec.dim), jnp.float32) if keys else None
    return Case(
        name,
        functools.partial(launch_triton.encode_pool, channel_major=not keys, config=config),
        (
            shape((rows, tokens, KV_HEADS, spec.dim), jnp.bfloat16),
            pools.keys if keys else pools.values,
            shape((rows, tokens), jnp.int32),
            encoded,
            statistics,
            statistics,
        ),
        config=f"{config.tile} tokens, {config.num_warps} warps",
        donated=(1,),
        quick=quick,
    )


def together(bits: int, *, quick: bool, rows: int = 32, blocks: bool = False) -> Case:
    """Encodes keys and values of several rows, one token each, in one launch.

    Args:
        bits: Bits of keys and values.
        quick: Whether the case is compiled by default.
        rows: Rows of the batch.
        blocks: Whether all arrays of a page lie side by side, as in a serving engine: then tokens of the window are
            copied as they are, and values are heads of a joint product.
    """
    spec = QuantizerSpec(128, bits, search=True)
    shape = jax.ShapeDtypeStruct
    pools = jax.eval_shape(lambda: empty_pages(PAGES, KV_HEADS, PAGE_SIZE, spec.format, spec.format))
    exact = None
    if blocks:
        pools, pool = in_blocks(pools, spec, spec), shape((1025, KV_HEADS, 128), jnp.bfloat16)
        exact = ExactTokens(pool, pool, shape((rows, 1, 2), jnp.int32))
    encoded = jax.eval_shape(lambda: encoder(make_quantizer(spec)))

    def run(
        keys: Any, values: Any, pages: Any, slots: Any, encoder: Any, statistics: Any, number: Any, copies: Any
    ) -> Any:
        options = {"key": encoder, "value": encoder, "mean": statistics, "weight": statistics}
        arguments = EncodeArguments(keys, values, slots, rows=number, **options)
        return launch_triton.encode_and_copy(arguments, pages, copies, interpret=False)

    keys, values = (
        shape((rows, 1, heads, 128), jnp.bfloat16) for heads in (KV_HEADS, 6 * KV_HEADS if blocks else KV_HEADS)
    )
    return Case(
        f"K{bits}/V{bits} search, {rows} rows" + (" in blocks" if blocks else ""),
        run,
        (
            keys,
            values,
            pools,
            shape((rows, 1), jnp.int32),
            encoded,
            shape((rows, KV_HEADS, 128), jnp.float32),
            shape((rows,), jnp.int32),
            exact,
        ),
        donated=(2,),
        quick=quick,
    )
