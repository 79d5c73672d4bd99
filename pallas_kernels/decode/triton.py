"""Launch of the Pallas Triton decode kernel and the merge of its splits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.decode.config import TileConfig, default_config, num_splits
from pallas_kernels.decode.layout import key_parts, value_parts
from pallas_kernels.decode.options import LogitOptions
from pallas_kernels.decode.pages import Pages
from pallas_kernels.decode.partial import NO_KEY, Partial
from pallas_kernels.decode.triton_body import Inputs, Plan, attend
from pallas_kernels.format import CodebookFormat, VectorFormat
from pallas_kernels.packing import plane_widths

MAX_QUERY_TOKENS, MAX_GROUP, MAX_COLUMNS = 8, 16, 32
DIMS = (64, 80, 96, 128, 192, 256)
"""Head dims that are tested."""


def attend_pages(
    query: Float[Array, "b t h_q d"],
    pages: Pages,
    block_table: Int[Array, "b n"],
    lengths: Int[Array, "b"],
    *,
    positions: Int[Array, "b t"],
    key_format: VectorFormat,
    value_format: VectorFormat,
    options: LogitOptions,
    logit_bias: Float[Array, "b t h_q"] | None,
    sketch_query: Float[Array, "b t h_q d"] | None,
    config: TileConfig | None = None,
    interpret: bool | None = None,
) -> Partial:
    """See `pallas_kernels.decode.decode_attention`.

    Args:
        query: As there, and likewise the arguments not listed here.
        pages: As there.
        block_table: As there.
        lengths: As there.
        positions: As there.
        key_format: As there.
        value_format: As there.
        options: As there.
        logit_bias: As there.
        sketch_query: As there.
        config: Tile sizes; by default those for the page size.
        interpret: Whether to run the kernel as jnp; by default where JAX has no GPU.

    Returns:
        The partial attention, normalized: `acc` is the output, `peak` the log of the sum of exponentials, `total` 1 (0
        where no key is visible).

    Raises:
        NotImplementedError: For shapes or formats outside the kernel's limits.
    """
    batch, count, heads, _ = query.shape
    kv_heads, page_size = pages.keys.packed.shape[1:3]
    check_supported(query.shape, pages, key_format, value_format, config)
    group = heads // kv_heads
    columns = padded_columns(count * group)
    config = config_for(query.shape, pages, value_format) if config is None else config
    splits = num_splits(config, batch=batch, kv_heads=kv_heads, capacity=block_table.shape[1] * page_size)
    plan = Plan(
        keys=key_parts(key_format),
        values=value_parts(value_format),
        options=options,
        count=count,
        group=group,
        columns=columns,
        tile=config.tile,
        page_size=page_size,
        splits=splits,
        num_warps=config.num_warps,
        precise=config.precise,
        interpret=jax.default_backend() != "gpu" if interpret is None else interpret,
    )
    inputs = Inputs(
        query=query.astype(jnp.float32),
        pages=jax.tree.map(lambda pool: pool if pool.size else None, pages),
        table=block_table.astype(jnp.int32),
        lengths=lengths.astype(jnp.int32),
        positions=positions.astype(jnp.int32),
        bias=logit_bias,
        sketch=sketch_query,
        counting=np.arange(256, dtype=np.uint8),
    )
    lead = (batch, kv_heads, splits)
    shapes = [(*lead, value_format.dim, columns), (*lead, columns), (*lead, columns)]
    acc, peak, total = pl.pallas_call(
        functools.partial(attend, plan=plan),
        grid=(splits, batch, kv_heads),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=plan.interpret,
        name="decode",
    )(inputs)
    return _merge_splits(acc, peak, total, count=count, group=group)


def config_for(
    query_shape: tuple[int, ...], pages: Pages, value_format: VectorFormat, *, precise: bool = False
) -> TileConfig:
    """The tiles that `attend_pages` takes by default."""
    _, count, heads, dim = query_shape
    kv_heads, page_size = pages.keys.packed.shape[1:3]
    columns, parts = padded_columns(count * heads // kv_heads), len(value_parts(value_format))
    return default_config(page_size, columns=columns, dim=dim, value_parts=parts, precise=precise)


def padded_columns(rows: int) -> int:
    """Columns that a number of query rows pads to."""
    return max(8, 1 << (rows - 1).bit_length())


def _merge_splits(acc: Array, peak: Array, total: Array, *, count: int, group: int) -> Partial:
    """Combines the splits [b, h_kv, splits, (d,) columns]; exponents are base 2 here and base e in the result."""
    batch, kv_heads, _, dim, _ = acc.shape
    acc, peak, total = (x[..., : count * group] for x in (acc, peak, total))
    top = jnp.max(peak, axis=2)
    weight = jnp.exp2(peak - top[:, :, None])
    sums = jnp.sum(total * weight, axis=2)
    seen = sums > 0
    out = jnp.sum(acc * weight[:, :, :, None], axis=2) / jnp.where(seen, sums, 1.0)[:, :, None]
    peak = jnp.where(seen, (top + jnp.log2(jnp.where(seen, sums, 1.0))) * math.log(2), NO_KEY)

    def queries_first(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], count, group), -2, 1)
        return jnp.moveaxis(x, -1, 3)

    def per_query(x: Array) -> Array:
        return queries_first(x).reshape(batch, count, kv_heads * group)

    acc = queries_first(out).reshape(batch, count, kv_heads * group, dim)
    return Partial(acc, per_query(peak), per_query(seen.astype(jnp.float32)))


def check_supported(
    query_shape: tuple[int, ...],
    pages: Pages,
    key_format: VectorFormat,
    value_format: VectorFormat,
    config: TileConfig | None,
) -> None:
    """Raises NotImplementedError, naming value and limit, for what the kernel does not do."""
    _, count, heads, dim = query_shape
    kv_heads, page_size = pages.keys.packed.shape[1:3]
    group = heads // kv_heads
    if dim not in DIMS or value_format.dim not in DIMS:
        raise NotImplementedError(f"the Triton kernel has head dims {DIMS}, got {dim} and {value_format.dim}")
    if count > MAX_QUERY_TOKENS or group > MAX_GROUP:
        raise NotImplementedError(
            f"the Triton kernel has up to {MAX_QUERY_TOKENS} query tokens and {MAX_GROUP} query heads a KV head, "
            f"got {count} and {group}"
        )
    columns = padded_columns(count * group)
    if columns > MAX_COLUMNS:
        raise NotImplementedError(
            f"the Triton kernel has up to {MAX_COLUMNS} query rows a KV head (query tokens times query heads), "
            f"got {count * group}"
        )
    if config is not None and config.precise and columns > 8:
        raise NotImplementedError(f"precise=True has up to 8 query rows a KV head, got {count * group}")
    value_parts(value_format)
    tile = (config_for(query_shape, pages, value_format) if config is None else config).tile
    if page_size % tile:
        raise NotImplementedError(f"the Triton kernel reads pages of a multiple of {tile} tokens, got {page_size=}")
    for array in jax.tree.leaves(pages):
        # Pallas addresses arrays up to 4 GiB with signed 32 bits.
        if 2**31 < array.size * array.dtype.itemsize <= 2**32:
            raise NotImplementedError(
                f"the Triton kernel addresses pools up to 2 GiB or above 4 GiB, got {array.size * array.dtype.itemsize}"
            )
    key_parts(key_format)
    assert isinstance(key_format, CodebookFormat)
    _check_key_planes(key_format)


def _check_key_planes(fmt: CodebookFormat) -> None:
    """Raises NotImplementedError for keys whose planes do not start at whole words, as loads of four bytes need."""
    for dim, bits in [(book.dim, book.bits) for book in fmt.segments] + [(fmt.dim, 1)] * fmt.residual:
        for width in plane_widths(bits):
            if dim * width % 32:
                raise NotImplementedError(
                    f"the Triton kernel has key planes of a multiple of 4 bytes, got {dim} channels of {width} bits"
                )
