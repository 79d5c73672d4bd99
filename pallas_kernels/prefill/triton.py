"""Launch of the Pallas Triton prefill kernel and the merge of its splits."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.decode import triton as decode
from pallas_kernels.decode.layout import LEAST_VALUE_TILE, codebook_parts, value_parts
from pallas_kernels.decode.options import LogitOptions
from pallas_kernels.decode.pages import Pages
from pallas_kernels.decode.partial import NO_KEY, Partial
from pallas_kernels.format import CodebookFormat, VectorFormat
from pallas_kernels.prefill.config import PrefillConfig, default_config, num_splits
from pallas_kernels.prefill.half import UNIT
from pallas_kernels.prefill.triton_body import FLOOR, LOG2_E, Inputs, Plan, attend

LEAST_QUERY = 1e-12
"""Queries whose largest channel, in steps, is below it are taken for zero."""


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
    config: PrefillConfig | None = None,
    interpret: bool | None = None,
) -> Partial:
    """See `pallas_kernels.prefill.prefill_attention`.

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
        config: Tile sizes; by default those for the shapes.
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
    assert isinstance(key_format, CodebookFormat)
    group = heads // kv_heads
    config = config_for(query.shape, pages, value_format) if config is None else config
    blocks = -(-count * group // config.rows)
    splits = num_splits(config, blocks=batch * kv_heads * blocks, capacity=block_table.shape[1] * page_size)
    plan = Plan(
        keys=codebook_parts(key_format, least=LEAST_VALUE_TILE, smallest=LEAST_VALUE_TILE),
        values=value_parts(value_format),
        options=options,
        count=count,
        group=group,
        rows=config.rows,
        tile=config.tile,
        page_size=page_size,
        splits=splits,
        interpret=jax.default_backend() != "gpu" if interpret is None else interpret,
    )
    normalized, factor = _normalize(query, sketch_query, plan)
    inputs = Inputs(
        query=normalized,
        factor=factor,
        pages=jax.tree.map(lambda pool: pool if pool.size else None, pages),
        table=block_table.astype(jnp.int32),
        lengths=lengths.astype(jnp.int32),
        positions=positions.astype(jnp.int32),
        bias=logit_bias,
    )
    lead = (splits, batch, count, heads)
    out, peak = pl.pallas_call(
        functools.partial(attend, plan=plan),
        grid=(blocks, splits, batch * kv_heads),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*lead, value_format.dim), lead)],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=plan.interpret,
        name="prefill",
    )(inputs)
    return _merge_splits(out, peak)


def _normalize(
    query: Float[Array, "b t h_q d"], sketch_query: Float[Array, "b t h_q d"] | None, plan: Plan
) -> tuple[Float[Array, "b t h_q c"], Float[Array, "b t h_q"]]:
    """float16 queries for the key parts, divided by their largest channel, and the factor of the kernel's logits."""
    parts = []
    for part in plan.keys:
        source = sketch_query if part.sketch else query
        assert source is not None
        channels = lax.slice_in_dim(source, part.channel, part.channel + part.book.dim, axis=-1)
        parts.append(channels.astype(jnp.float32) * (part.book.step * UNIT))
    whole = jnp.concatenate(parts, axis=-1)
    largest = jnp.maximum(jnp.max(jnp.abs(whole), axis=-1), LEAST_QUERY)
    return (whole / largest[..., None]).astype(jnp.float16), largest * (plan.options.scale * LOG2_E)


def _merge_splits(out: Float[Array, "s b t h_q d"], peak: Float[Array, "s b t h_q"]) -> Partial:
    """Combines the splits; exponents are base 2 here and base e in the result."""
    top = jnp.max(peak, axis=0)
    seen = top > FLOOR
    if out.shape[0] > 1:
        weight = jnp.where(seen[None], jnp.exp2(peak - top[None]), 0.0)
        sums = jnp.where(seen, jnp.sum(weight, axis=0), 1.0)
        out = jnp.sum(out * (weight / sums[None])[..., None], axis=0)
        top = top + jnp.log2(sums)
    else:
        out = out[0]
    return Partial(out, jnp.where(seen, top * math.log(2), NO_KEY), seen.astype(jnp.float32))


def config_for(query_shape: tuple[int, ...], pages: Pages, value_format: VectorFormat) -> PrefillConfig:
    """The tiles that `attend_pages` takes by default."""
    _, count, heads, _ = query_shape
    kv_heads, page_size = pages.keys.packed.shape[1:3]
    return default_config(page_size, query_rows=count * heads // kv_heads, dim=value_format.dim)


def check_supported(
    query_shape: tuple[int, ...],
    pages: Pages,
    key_format: VectorFormat,
    value_format: VectorFormat,
    config: PrefillConfig | None,
) -> None:
    """Raises NotImplementedError, naming value and limit, for what the kernel does not do."""
    batch, _, heads, dim = query_shape
    kv_heads, page_size = pages.keys.packed.shape[1:3]
    if heads // kv_heads > decode.MAX_GROUP:
        raise NotImplementedError(
            f"the Triton kernel has up to {decode.MAX_GROUP} query heads a KV head, got {heads // kv_heads}"
        )
    # Formats, dims and pools have the limits of the decode kernel, whatever the number of query rows.
    decode.check_supported((batch, 1, kv_heads, dim), pages, key_format, value_format, None)
    tile = (config_for(query_shape, pages, value_format) if config is None else config).tile
    if page_size % tile:
        raise NotImplementedError(f"the Triton kernel reads pages of a multiple of {tile} tokens, got {page_size=}")
