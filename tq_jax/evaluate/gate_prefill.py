"""Prefill kernels to compile: formats, head dims, masks and row counts; not every combination."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode import LogitOptions
from pallas_kernels.decode.pages import empty_pages
from pallas_kernels.prefill.triton import attend_pages, config_for
from tq_jax.evaluate.gate import Case
from tq_jax.evaluate.gate_decode import BATCH, EVERYTHING, KV_HEADS, PAGE_SIZE, PAGES, PLAIN
from tq_jax.quantizer import QuantizerSpec


def cases() -> Iterator[Case]:
    """The cases; none is quick, as nearly all spill registers on some architecture."""
    spec = QuantizerSpec
    for bits in (1, 2, 3, 4, 8):
        yield case(f"K{bits}/V{bits}", spec(128, bits), spec(128, bits))
    for dim in (64, 80, 96, 192, 256):
        yield case(f"K4/V4 dim {dim}", spec(dim, 4), spec(dim, 4))
    four, two = spec(128, 4), spec(128, 2, kind="group")
    yield case("K3.5/V2.5", spec(128, 3.5), spec(128, 2.5))
    yield case("prod 3, min-max 2", spec(128, 3, kind="prod"), two)
    yield case("min-max 4", four, spec(128, 4, kind="group"))
    for group, count in ((1, 256), (16, 64), (4, 9)):
        yield case(f"group {group}, {count} queries", four, four, group=group, count=count)
    yield case("window, soft-cap, bias", four, four, options=EVERYTHING, bias=True)


def case(
    name: str,
    key: QuantizerSpec,
    value: QuantizerSpec,
    *,
    group: int = 4,
    count: int = 256,
    options: LogitOptions = PLAIN,
    bias: bool = False,
) -> Case:
    """Attention of a chunk over pages of two quantizers; arguments as in `gate_decode.case`."""
    shape = jax.ShapeDtypeStruct
    pages = jax.eval_shape(lambda: empty_pages(BATCH * PAGES, KV_HEADS, PAGE_SIZE, key.format, value.format))
    query = shape((BATCH, count, KV_HEADS * group, key.dim), jnp.float32)
    config = config_for(query.shape, pages, value.format)

    def run(query: Any, pages: Any, table: Any, lengths: Any, positions: Any, bias: Any, sketch: Any) -> Any:
        return attend_pages(
            query,
            pages,
            table,
            lengths,
            positions=positions,
            key_format=key.format,
            value_format=value.format,
            options=options,
            logit_bias=bias,
            sketch_query=sketch,
            config=config,
            interpret=False,
        )

    integers = [shape(s, jnp.int32) for s in ((BATCH, PAGES), (BATCH,), (BATCH, count))]
    biases = shape(query.shape[:3], jnp.float32) if bias else None
    return Case(
        name,
        run,
        (query, pages, *integers, biases, query if key.kind == "prod" else None),
        config=f"{config.rows} rows, {config.tile} tokens, {config.num_warps} warps, {config.num_stages} stages",
        expected={"prefill": ("half mma",)},
    )
