"""Launch of the Pallas Triton prefill kernel and the merge of its splits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.arguments import PagedArguments
from pallas_kernels.attention.decode import launch_triton as decode
from pallas_kernels.attention.partial import Partial
from pallas_kernels.attention.prefill.config import PrefillConfig, default_config, num_splits
from pallas_kernels.attention.prefill.kernel_triton import MARKS, PrefillInputs, PrefillPlan, attend
from pallas_kernels.compat.device import compute_capability, multiprocessors
from pallas_kernels.dispatch import interprets
from pallas_kernels.format import CodebookFormat, VectorFormat
from pallas_kernels.numerics import FLOOR, HIDDEN, LARGEST_HALF, LOG2_E
from pallas_kernels.pages import Pages
from pallas_kernels.tiles.float16_triton import UNIT
from pallas_kernels.tiles.layout import LEAST_VALUE_TILE, codebook_parts, value_parts
from pallas_kernels.tiles.loads_triton import shift_table
from pallas_kernels.tiles.pool_ref import addressed


def attend_pages(x: PagedArguments, *, config: PrefillConfig | None = None, interpret: bool | None = None) -> Partial:
    """Attends with many query tokens by the prefill kernel and merges its splits.

    Args:
        x: Many queries over packed pages.
        config: Query rows and tokens of a program; by default those for the shapes.
        interpret: Whether to run the kernel as jnp; by default where JAX has no GPU.

    Returns:
        The normalized partial attention, see `Partial`.

    Raises:
        NotImplementedError: For shapes or formats outside the kernel's limits.
    """
    batch, count, heads, _ = x.query.shape
    check_supported(x.query.shape, x.pages, x.key_format, x.value_format, config)
    assert isinstance(x.key_format, CodebookFormat)
    kv_heads, group = x.kv_heads, x.group
    config = config_for(x.query.shape, x.pages, x.key_format, x.value_format) if config is None else config
    blocks = -(-count * group // config.rows)
    splits = num_splits(config, blocks=batch * kv_heads * blocks, capacity=x.block_table.shape[1] * x.page_size)
    pages, pools = addressed(x.pages, x.pages.page_shapes)
    plan = PrefillPlan(
        keys=codebook_parts(x.key_format, least=LEAST_VALUE_TILE, smallest=LEAST_VALUE_TILE),
        values=value_parts(x.value_format),
        options=x.options,
        count=count,
        group=group,
        rows=config.rows,
        tile=config.tile,
        page_size=x.page_size,
        splits=splits,
        pools=pools,
        interpret=interprets() if interpret is None else interpret,
    )
    rows = _rows(x.positions.astype(jnp.int32), plan)
    inputs = PrefillInputs(
        query=_scaled_queries(x.query, x.sketch_query, plan),
        pages=pages,
        table=x.block_table.astype(jnp.int32),
        lengths=x.lengths.astype(jnp.int32),
        positions=rows,
        bounds=jnp.concatenate([f(rows, axis=-1, keepdims=True) for f in (jnp.min, jnp.max)], axis=-1),
        bias=x.logit_bias,
        shifts=shift_table(plan),
        marks=np.array(MARKS, np.uint8),
    )
    lead = (splits, batch, count, heads)
    out, peak = pl.pallas_call(
        functools.partial(attend, plan=plan),
        grid=(blocks, splits, batch * kv_heads),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*lead, x.value_format.dim), lead)],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=plan.interpret,
        name="prefill",
    )(inputs)
    return _merge_splits(out, peak)


def _scaled_queries(
    query: Float[Array, "b t h_q d"], sketch_query: Float[Array, "b t h_q d"] | None, plan: PrefillPlan
) -> Float[Array, "b t h_q c"]:
    """float16 queries for the key parts, times all that logits are multiplied by, so that the kernel need not."""
    parts = []
    for part in plan.keys:
        source = sketch_query if part.sketch else query
        assert source is not None
        channels = lax.slice_in_dim(source, part.channel, part.channel + part.book.dim, axis=-1)
        parts.append(channels.astype(jnp.float32) * (part.book.step * UNIT * plan.options.scale * LOG2_E))
    return jnp.clip(jnp.concatenate(parts, axis=-1), -LARGEST_HALF, LARGEST_HALF).astype(jnp.float16)


def _rows(positions: Int[Array, "b t"], plan: PrefillPlan) -> Int[Array, "b n r"]:
    """Positions of the rows of each block, of which the last is filled up."""
    blocks, batch = -(-plan.count * plan.group // plan.rows), positions.shape[0]
    rows = jnp.broadcast_to(positions[:, :, None], (*positions.shape, plan.group)).reshape(batch, -1)
    last = lax.slice_in_dim(positions, plan.count - 1, plan.count, axis=1)
    filled = jnp.broadcast_to(last, (batch, blocks * plan.rows - plan.count * plan.group))
    return jnp.concatenate([rows, filled], axis=1).reshape(batch, blocks, plan.rows)


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
    return Partial(out, jnp.where(seen, top * math.log(2), HIDDEN), seen.astype(jnp.float32))


def config_for(
    query_shape: tuple[int, ...],
    pages: Pages,
    key_format: VectorFormat,
    value_format: VectorFormat,
    *,
    capability: int | None = None,
) -> PrefillConfig:
    """The tiles that `attend_pages` takes by default on this device, or on one of a compute capability times ten."""
    _, count, heads, dim = query_shape
    kv_heads, page_size = pages.kv_heads, pages.page_size
    capability = compute_capability() if capability is None else capability
    # Codes of 8 bits take more registers where all operands of products are in registers.
    bits = 0 if capability in (90, 100) else max(decode.widest(key_format), decode.widest(value_format))
    mixed = _is_mixed(key_format) or _is_mixed(value_format)
    return default_config(
        page_size,
        query_rows=count * heads // kv_heads,
        dim=max(dim, value_format.dim),
        lean=_is_lean(key_format) and _is_lean(value_format),
        heavy=bits == 8 or mixed,
        mixed=mixed,
        capability=capability,
        multiprocessors=multiprocessors(),
    )


def _is_lean(fmt: VectorFormat) -> bool:
    """Whether a format has 4 bits and one scale per token."""
    return isinstance(fmt, CodebookFormat) and not fmt.residual and [book.bits for book in fmt.segments] == [4]


def _is_mixed(fmt: VectorFormat) -> bool:
    """Whether a format has several segments."""
    return isinstance(fmt, CodebookFormat) and len(fmt.segments) > 1


def check_supported(
    query_shape: tuple[int, ...],
    pages: Pages,
    key_format: VectorFormat,
    value_format: VectorFormat,
    config: PrefillConfig | None,
) -> None:
    """Raises NotImplementedError, naming value and limit, for what the kernel does not do."""
    batch, _, heads, dim = query_shape
    kv_heads, page_size = pages.kv_heads, pages.page_size
    if heads // kv_heads > decode.MAX_GROUP:
        raise NotImplementedError(
            f"the Triton kernel has up to {decode.MAX_GROUP} query heads per KV head, got {heads // kv_heads}"
        )
    # Formats, dims and pools have the limits of the decode kernel, whatever the number of query rows.
    decode.check_supported((batch, 1, kv_heads, dim), pages, key_format, value_format, None)
    config = config_for(query_shape, pages, key_format, value_format) if config is None else config
    if page_size % config.tile and config.tile % page_size:
        raise NotImplementedError(
            f"the Triton kernel reads pages of a multiple of 16 tokens that divide {config.tile} or are a multiple of "
            f"it, got {page_size=}"
        )
