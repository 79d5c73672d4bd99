"""Launch of the Pallas Triton decode kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.arguments import PagedArguments
from pallas_kernels.attention.decode.config import TileConfig, column_block, default_config, num_splits, padded_columns
from pallas_kernels.attention.decode.kernel_triton import attend
from pallas_kernels.attention.decode.plan import DecodeInputs, DecodePlan
from pallas_kernels.attention.exact import ExactInputs, ExactPlan
from pallas_kernels.attention.merge_triton import MergeInputs, Splits, merge_plan, merge_splits
from pallas_kernels.attention.partial import Partial
from pallas_kernels.compat.device import compute_capability, multiprocessors
from pallas_kernels.dispatch import interprets
from pallas_kernels.format import CodebookFormat, VectorFormat
from pallas_kernels.pages import Pages
from pallas_kernels.tiles.layout import key_parts, value_parts
from pallas_kernels.tiles.loads_triton import shift_table
from pallas_kernels.tiles.pool_ref import addressed

MAX_QUERY_TOKENS = 8
"""Most query tokens per sequence of the decode kernel; longer chunks run in the prefill kernel."""

MAX_GROUP = 16
DIMS = (64, 80, 96, 128, 192, 256)
"""Head dims that are tested."""


def attend_pages(x: PagedArguments, *, config: TileConfig | None = None, interpret: bool | None = None) -> Partial:
    """Attends over packed pages by the decode kernel and merges its splits.

    Args:
        x: Queries, pages and options.
        config: Tile sizes; by default those for the page size.
        interpret: Whether to run the kernel as jnp; by default where JAX has no GPU.

    Returns:
        The normalized partial attention, see `Partial`.

    Raises:
        NotImplementedError: For shapes or formats outside the kernel's limits.
    """
    interpret = interprets() if interpret is None else interpret
    splits, _ = attend_splits(x, config=config, interpret=interpret)
    merging = merge_plan(
        (*x.query.shape[:3], x.value_format.dim),
        splits=splits.acc.shape[2],
        dtype="float32",
        partial=True,
        interpret=interpret,
    )
    return Partial(*merge_splits(MergeInputs(splits), merging))


def attend_splits(
    x: PagedArguments,
    exact: tuple[ExactInputs, ExactPlan] | None = None,
    *,
    config: TileConfig | None,
    precise: bool = False,
    interpret: bool,
) -> tuple[Splits, Splits | None]:
    """Attends over packed pages and tokens in full precision by the decode kernel, whose splits are left as they are.

    Args:
        x: Queries, pages and options.
        exact: Queries as the model has them and tokens in full precision, with their plan; None for pages alone.
        config: Tile sizes; None for those for the page size.
        precise: Whether the tiles by default are precise ones, see `TileConfig`.
        interpret: Whether to run the kernel as jnp.

    Returns:
        The splits of the pages, and those of tokens in full precision, if there are any.

    Raises:
        NotImplementedError: For shapes or formats outside the kernel's limits.
    """
    plan, num_warps, num_stages = decode_plan(x, config=config, precise=precise, interpret=interpret)
    tokens, how = exact or (None, None)
    plan = dataclasses.replace(plan, exact=how)
    inputs = DecodeInputs(
        query=x.query.astype(jnp.float32),
        pages=x.pages,
        table=x.block_table.astype(jnp.int32),
        lengths=x.lengths.astype(jnp.int32),
        positions=x.positions.astype(jnp.int32),
        bias=x.logit_bias,
        sketch=x.sketch_query,
        exact=tokens,
    )
    return decode(inputs, x.value_format.dim, plan, num_warps=num_warps, num_stages=num_stages)


def decode_plan(
    x: PagedArguments, *, config: TileConfig | None, precise: bool = False, interpret: bool
) -> tuple[DecodePlan, int, int]:
    """The plan, the number of warps and the number of stages for queries over pages.

    Raises:
        NotImplementedError: For shapes or formats outside the kernel's limits.
    """
    shapes = x.query.shape, x.pages, x.key_format, x.value_format
    check_supported(*shapes, config, precise=precise)
    config = config_for(*shapes, precise=precise) if config is None else config
    columns, blocks, splits = _page_programs(
        x.query.shape, x.pages, x.value_format, config, pages_per_row=x.block_table.shape[1]
    )
    plan = DecodePlan(
        keys=key_parts(x.key_format),
        values=value_parts(x.value_format, num_warps=config.num_warps),
        options=x.options,
        count=x.query.shape[1],
        group=x.group,
        columns=columns,
        blocks=blocks,
        tile=config.tile,
        page_size=x.page_size,
        splits=splits,
        num_warps=config.num_warps,
        precise=config.precise,
        interpret=interpret,
    )
    return plan, config.num_warps, stages_for(x.key_format, config)


def _page_programs(
    query_shape: tuple[int, ...],
    pages: Pages,
    value_format: VectorFormat,
    config: TileConfig,
    *,
    pages_per_row: int,
) -> tuple[int, int, int]:
    """Query columns of a program, and into how many blocks of columns and splits a sequence and KV head are cut."""
    batch, count, heads, dim = query_shape
    dim = max(dim, value_format.dim)
    columns = padded_columns(count * heads // pages.kv_heads, dim=dim)
    block, capacity = column_block(columns, dim=dim), pages_per_row * pages.page_size
    return block, columns // block, num_splits(config, batch=batch, kv_heads=pages.kv_heads, capacity=capacity)


def free_programs(
    query_shape: tuple[int, ...],
    pages: Pages,
    value_format: VectorFormat,
    config: TileConfig,
    *,
    pages_per_row: int,
) -> int:
    """Programs per sequence and KV head that the device could run beside those for the pages, all at once."""
    _, blocks, splits = _page_programs(query_shape, pages, value_format, config, pages_per_row=pages_per_row)
    return config.programs // (query_shape[0] * pages.kv_heads) - splits * blocks


def stages_for(key_format: VectorFormat, config: TileConfig) -> int:
    """Steps whose loads are in flight at once."""
    # Pipelined loads of 4-bit keys of 192 channels came out wrong on an H100; those of other widths and dims did not.
    wrong = isinstance(key_format, CodebookFormat) and any((b.bits, b.dim) == (4, 192) for b in key_format.segments)
    return 1 if wrong else config.num_stages


def decode(
    x: DecodeInputs, value_dim: int, plan: DecodePlan, *, num_warps: int, num_stages: int
) -> tuple[Splits, Splits | None]:
    """Launches the kernel: the splits of the pages, and those of tokens in full precision, if there are any."""
    batch, kv_heads = x.lengths.shape[0], x.pages.kv_heads
    lead = (batch, kv_heads, plan.splits)
    columns = plan.columns * plan.blocks
    shapes = [(*lead, plan.count * plan.group, value_dim), (*lead, columns), (*lead, columns)]
    packed = Splits(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    pages, pools = addressed(x.pages, x.pages.page_shapes)
    plan = dataclasses.replace(plan, pools=pools)
    programs = 0 if plan.exact is None else plan.exact.programs
    out = pl.pallas_call(
        functools.partial(attend, plan=plan) if plan.exact else functools.partial(attend, exact=None, plan=plan),
        grid=(programs + plan.splits * plan.blocks, batch, kv_heads),
        out_shape=[packed] if plan.exact is None else [packed, plan.exact.outputs()],
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=plan.interpret,
        name="decode",
    )(dataclasses.replace(x, pages=pages, shifts=shift_table(plan)))
    return out[0], out[1] if plan.exact else None


def config_for(
    query_shape: tuple[int, ...],
    pages: Pages,
    key_format: VectorFormat,
    value_format: VectorFormat,
    *,
    precise: bool = False,
    capability: int | None = None,
) -> TileConfig:
    """The tiles that `attend_pages` takes by default on this device, or on one of a compute capability times ten."""
    _, count, heads, _ = query_shape
    kv_heads, page_size = pages.kv_heads, pages.page_size
    dim = max(query_shape[3], value_format.dim)
    return default_config(
        page_size,
        columns=padded_columns(count * heads // kv_heads, dim=dim),
        dim=dim,
        value_parts=len(value_parts(value_format)),
        sketched=isinstance(key_format, CodebookFormat) and key_format.residual,
        precise=precise,
        bits=(widest(key_format), widest(value_format)),
        capability=compute_capability() if capability is None else capability,
        multiprocessors=multiprocessors(),
    )


def widest(fmt: VectorFormat) -> int:
    """Bits of a format's widest codes."""
    return max(book.bits for book in fmt.segments) if isinstance(fmt, CodebookFormat) else fmt.bits


def check_supported(
    query_shape: tuple[int, ...],
    pages: Pages,
    key_format: VectorFormat,
    value_format: VectorFormat,
    config: TileConfig | None,
    *,
    precise: bool = False,
) -> None:
    """Raises NotImplementedError, naming value and limit, for what the kernel does not do."""
    _, count, heads, dim = query_shape
    kv_heads, page_size = pages.kv_heads, pages.page_size
    group = heads // kv_heads
    if dim not in DIMS or value_format.dim not in DIMS:
        raise NotImplementedError(f"the Triton kernel has head dims {DIMS}, got {dim} and {value_format.dim}")
    if count > MAX_QUERY_TOKENS or group > MAX_GROUP:
        raise NotImplementedError(
            f"the Triton kernel has up to {MAX_QUERY_TOKENS} query tokens and {MAX_GROUP} query heads per KV head, "
            f"got {count} and {group}"
        )
    key_parts(key_format)
    config = config_for(query_shape, pages, key_format, value_format, precise=precise) if config is None else config
    dim = max(dim, value_format.dim)
    columns = column_block(padded_columns(count * group, dim=dim), dim=dim)
    if config.num_warps > 2 and columns > 8:
        raise NotImplementedError(
            f"the Triton kernel has up to 2 warps for more than 8 query columns, got {config.num_warps} for {columns}"
        )
    if page_size % 16 or (page_size % config.tile and config.tile % page_size):
        raise NotImplementedError(
            f"the Triton kernel reads pages of a multiple of 16 tokens that divide {config.tile} or are a multiple of "
            f"it, got {page_size=}"
        )
