"""Launches of the kernel: one for keys, one for values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.attention.decode.launch_triton import DIMS
from pallas_kernels.compat.device import multiprocessors
from pallas_kernels.dequantize.arguments import DequantizeArguments, matrix_gain
from pallas_kernels.dequantize.kernel_triton import KEYS, VALUES, DequantizeInputs, DequantizePlan, dequantize
from pallas_kernels.dispatch import interprets
from pallas_kernels.format import Code, CodebookFormat, VectorFormat
from pallas_kernels.numerics import power_of_two
from pallas_kernels.tiles.layout import LEAST_VALUE_TILE, codebook_parts, value_parts
from pallas_kernels.tiles.loads_triton import shift_table
from pallas_kernels.tiles.pool_ref import addressed

LARGEST_TILE, LARGEST_TILE_CHANNELS = 64, 64 * 128
"""Most tokens, and most padded channels times tokens, of a step: what registers hold."""

PROGRAMS = 4
"""Programs per multiprocessor to aim at."""


def check_supported(x: DequantizeArguments) -> None:
    """Raises NotImplementedError, naming value and limit, for what the kernel does not do."""
    dims = x.key_format.dim, x.value_format.dim
    if any(dim not in DIMS for dim in dims):
        raise NotImplementedError(f"the Triton kernel has head dims {DIMS}, got {dims[0]} and {dims[1]}")
    if x.page_size % 16 or (LARGEST_TILE % x.page_size and x.page_size % LARGEST_TILE):
        raise NotImplementedError(
            f"the Triton kernel reads pages of 16 or 32 tokens, or of a multiple of {LARGEST_TILE}, got "
            f"page_size={x.page_size}"
        )
    for fmt, axis in ((x.key_format, KEYS), (x.value_format, VALUES)):
        _parts(fmt, axis)


def dequantize_pages(
    x: DequantizeArguments, *, tokens: int, dtype: Any, interpret: bool | None = None
) -> tuple[Float[Array, "tokens h d"], Float[Array, "tokens h d"]]:
    """Dense keys and values; places of no token are arbitrary. Arguments as for `pallas_kernels.dequantize`.

    Raises:
        NotImplementedError: For shapes or formats outside the kernel's limits.
    """
    check_supported(x)
    interpret = interprets() if interpret is None else interpret
    launch = functools.partial(_launch, x, tokens=tokens, dtype=dtype, interpret=interpret)
    return launch(x.pages.keys, KEYS), launch(x.pages.values, VALUES)


def _launch(
    x: DequantizeArguments, pools: Code, axis: int, *, tokens: int, dtype: Any, interpret: bool
) -> Float[Array, "tokens h d"]:
    fmt, matrix = (x.key_format, x.key_matrix) if axis == KEYS else (x.value_format, x.value_matrix)
    batch, heads = x.block_table.shape[0], x.heads.shape[0]
    of_keys, shapes = len(jax.tree.leaves(x.pages.keys)), x.pages.page_shapes
    code, found = addressed(pools, shapes[:of_keys] if axis == KEYS else shapes[of_keys:])
    tile = min(LARGEST_TILE, LARGEST_TILE_CHANNELS // power_of_two(fmt.dim))
    plan = DequantizePlan(
        parts=_parts(fmt, axis),
        axis=axis,
        gain=matrix_gain(fmt),
        coordinates=fmt.dim,
        tile=tile,
        page_size=x.page_size,
        splits=_num_splits(batch * heads, -(-x.block_table.shape[1] * x.page_size // tile)),
        interpret=interpret,
        pools=found,
    )
    centred = axis == KEYS and x.mean is not None
    inputs = DequantizeInputs(
        code=code,
        matrix=matrix,
        table=x.block_table.astype(jnp.int32),
        lengths=x.lengths.astype(jnp.int32),
        starts=x.starts.astype(jnp.int32),
        heads=x.heads.astype(jnp.int32),
        mean=x.mean if centred else None,
        weight=x.weight if centred else None,
        shifts=shift_table(plan),
    )
    return pl.pallas_call(
        functools.partial(dequantize, plan=plan),
        grid=(plan.splits, heads, batch),
        out_shape=jax.ShapeDtypeStruct((tokens, heads, fmt.dim), dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="dequantize_keys" if axis == KEYS else "dequantize_values",
    )(inputs)


def _parts(fmt: VectorFormat, axis: int) -> Any:
    """Parts of keys or values, in tiles of at least what a product of float16 sums over."""
    if axis == VALUES:
        return value_parts(fmt)
    if not isinstance(fmt, CodebookFormat):
        raise NotImplementedError(f"the kernel reads keys of codebook formats, got {type(fmt).__name__}")
    return codebook_parts(fmt, least=LEAST_VALUE_TILE, smallest=LEAST_VALUE_TILE)


def _num_splits(rows: int, tiles: int) -> int:
    """Programs per sequence and KV head: as many as fit the device at once, at most one per tile."""
    return max(1, min(tiles, PROGRAMS * multiprocessors() // rows))
