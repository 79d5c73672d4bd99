"""Cases of the decode kernel: every supported format, head dim, mask and row count, but not every combination."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import LogitOptions, PagedArguments, TileConfig
from pallas_kernels.attention.decode.launch_triton import attend_pages, config_for, stages_for
from pallas_kernels.blocks import ArrayPlace, BlockLayout, PageRows
from pallas_kernels.pages import Pages, empty_pages
from tq_jax.commands.gate.case import Case, by_tiles
from tq_jax.quantizer import QuantizerSpec

BATCH, PAGES, KV_HEADS, PAGE_SIZE = 2, 64, 2, 128
LARGE = 3 * 2**30 // (BATCH * KV_HEADS * PAGE_SIZE * 64)
"""Pages per row from which on pools of 4-bit codes need 64-bit offsets."""

PLAIN = LogitOptions(scale=0.1)
EVERYTHING = LogitOptions(scale=0.1, softcap=30.0, sliding_window=512)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the arguments of a case are, besides its quantizers; the defaults hold if a case does not say.

    Attributes:
        group: Query heads per KV head.
        count: Query tokens.
        options: Logit options.
        bias: Whether logits have a bias.
        page_size: Tokens per page.
        pages: Pages per row.
        blocks: Whether all arrays of a page lie side by side.
    """

    group: int = 4
    count: int = 1
    options: LogitOptions = PLAIN
    bias: bool = False
    page_size: int = PAGE_SIZE
    pages: int = PAGES
    blocks: bool = False

    def arguments(self, key: QuantizerSpec, value: QuantizerSpec) -> PagedArguments:
        """Shapes of the arguments of attention over pages of two quantizers."""
        shape: Any = jax.ShapeDtypeStruct
        query = shape((BATCH, self.count, KV_HEADS * self.group, key.dim), jnp.float32)
        pages, size = self.pages, self.page_size
        pools = jax.eval_shape(lambda: empty_pages(BATCH * pages, KV_HEADS, size, key.format, value.format))
        if self.blocks:
            pools = in_blocks(pools, key, value)
        table, lengths, positions = (shape(s, jnp.int32) for s in ((BATCH, pages), (BATCH,), (BATCH, self.count)))
        biases = shape(query.shape[:3], jnp.float32) if self.bias else None
        sketch = query if key.kind == "prod" else None
        formats = key.format, value.format
        return PagedArguments(query, pools, table, lengths, positions, *formats, self.options, biases, sketch)


def in_blocks(pools: Pages, key: QuantizerSpec, value: QuantizerSpec) -> PageRows:
    """Shapes of pages whose arrays lie side by side, of the shapes of dense pools."""
    layout = BlockLayout(pools.kv_heads, pools.page_size, key.format, value.format)

    def rows(place: ArrayPlace) -> Any:
        distance = layout.page_bytes // jnp.dtype(place.dtype).itemsize
        return jax.ShapeDtypeStruct((pools.count, distance), place.dtype)

    places = layout.places
    keys, values = jax.tree.map(rows, (places.keys, places.values))
    return PageRows(keys, values, layout)


def cases() -> Iterator[Case]:
    """Yields the cases; the quick cases cover each class of tiles and of code."""
    spec = QuantizerSpec
    for bits in (1, 2, 3, 4, 8):
        yield from cases_of(f"K{bits}/V{bits}", spec(128, bits), spec(128, bits), quick=bits > 1)
        yield from cases_of(
            f"K{bits}/V{bits} in blocks", spec(128, bits), spec(128, bits), blocks=True, quick=bits == 4
        )
        # With keys of 8 bits, queries always have two bytes.
        name = f"K{bits}/V{bits}, group 16, precise"
        yield from cases_of(name, spec(128, bits), spec(128, bits), group=16, precise=True, quick=bits == 3)
    for dim in (64, 80, 96, 192, 256):
        yield from cases_of(f"K4/V4 dim {dim}", spec(dim, 4), spec(dim, 4), quick=dim in (64, 256))
        low = 2 if dim == 80 else 3
        yield from cases_of(f"K{low}/V2 dim {dim}", spec(dim, low), spec(dim, 2), quick=dim in (80, 96, 192))
    four, two = spec(128, 4), spec(128, 2, kind="group")
    for bits in (2.5, 3.5):
        yield from cases_of(f"K{bits}/V{bits}", spec(128, bits), spec(128, bits), quick=bits == 3.5)
    for bits in (1, 2, 3, 4):
        yield from cases_of(f"prod {bits}, min-max 2", spec(128, bits, kind="prod"), two, quick=bits == 3)
    yield from cases_of("min-max 4", four, spec(128, 4, kind="group"))
    yield from cases_of("pools of 3 GiB", four, four, pages=LARGE, quick=True)
    for group, count in ((1, 1), (8, 1), (16, 1), (4, 2), (4, 5), (4, 8)):
        quick = (group, count) in ((16, 1), (4, 2))
        yield from cases_of(f"group {group}, {count} queries", four, four, group=group, count=count, quick=quick)
    name = "window, soft-cap, bias"
    yield from cases_of(name, four, four, options=EVERYTHING, bias=True, quick=True)
    yield from cases_of(f"{name}, 5 queries", four, four, options=EVERYTHING, bias=True, count=5)


def cases_of(
    name: str,
    key: QuantizerSpec,
    value: QuantizerSpec,
    *,
    precise: bool = False,
    quick: bool = False,
    **shape: Any,
) -> Iterator[Case]:
    """Attention over pages of two quantizers, one case per choice of tiles.

    Args:
        name: What distinguishes the case.
        key: Key quantizer.
        value: Value quantizer.
        precise: Whether queries have two bytes.
        quick: Whether the case is compiled by default.
        **shape: Fields of `Shape` that differ from its defaults.
    """
    arguments = Shape(**shape).arguments(key, value)

    def tiles(capability: int) -> TileConfig:
        formats = key.format, value.format
        return config_for(arguments.query.shape, arguments.pages, *formats, precise=precise, capability=capability)

    for config, architectures in by_tiles(tiles).items():
        stages = stages_for(key.format, config)
        # Codes of 8 bits need no lookup, and a single stage copies nothing ahead.
        found = ["mma", *(() if key.bits == value.bits == 8 else ("prmt",)), *(("async",) if stages > 1 else ())]
        yield Case(
            name if "sm_90" in architectures else f"{name}, {', '.join(architectures)}",
            functools.partial(attend_pages, config=config, interpret=False),
            (arguments,),
            config=f"{config.tile} tokens, {config.num_warps} warps, {stages} stages",
            expected={"decode": found},
            only=("decode",),
            architectures=architectures,
            quick=quick,
        )
