"""The sketch of a tile of residuals r: |r|, and the signs of S r, 51 GFLOP per million vectors of 128 channels."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.encode.loads_triton import Place, store_bytes, store_scalar
from pallas_kernels.encode.plan import EncodeInputs, EncodePlan
from pallas_kernels.encode.rotate_triton import cut, product
from pallas_kernels.format import CodebookFormat
from pallas_kernels.tiles.intrinsics_triton import perform


def store_residual(
    x: EncodeInputs,
    pool: Any,
    tiles: Sequence[jax.Array],
    down: jax.Array,
    at: Place,
    fmt: CodebookFormat,
    plan: EncodePlan,
) -> None:
    """Stores signs and norms of residuals.

    Args:
        x: The inputs.
        pool: The pool.
        tiles: float32 [tile, n] each, runs of channels of the residuals, scaled so that fp16 planes hold them; zero
            where a channel does not exist.
        down: float32 [tile], the factor that undoes the scaling.
        at: Place of each vector.
        fmt: Format of the pool.
        plan: The plan.
    """
    squared = tiles[0] * tiles[0]  # [tile, n]
    for tile in tiles[1:]:
        squared = perform("fma.rn.f32", tile, tile, squared, interpret=plan.interpret)
    norm = perform("sqrt.rn.f32", jnp.sum(squared, axis=1), interpret=plan.interpret) * down  # [tile]
    store_scalar(pool.residual, norm.astype(fmt.scale_dtype), at, None)
    # Bytes are [tile, padded bytes].
    bits = _signs([cut(tile, 2) for tile in tiles], x.sketch, plan)
    store_bytes(pool.signs, bits.astype(jnp.uint8), fmt.dim // 8, 0, at, channel_major=False)


def _signs(rows: list[list[jax.Array]], sketch: Sequence[Any], plan: EncodePlan) -> jax.Array:
    """Bytes of the signs of the product with the sketch.

    Args:
        rows: Planes [tile, n] of each run of channels.
        sketch: References to planes [padded dim, 8 * padded bytes]; see `EncodeInputs`.
        plan: The plan.

    Returns:
        int32 [tile, padded bytes].
    """
    width = sketch[0].shape[1]
    step, size = min(width, plan.chunk), width // 8
    contracted = rows[0][0].shape[1]
    shape = plan.tile, step // size, size

    def sign_bits(i: jax.Array, data: jax.Array) -> jax.Array:
        total = jnp.zeros((plan.tile, step), jnp.float32)  # [tile, step]
        for k, planes in enumerate(rows):
            part = pl.ds(k * contracted, contracted)
            total = product(planes, [plane[part, pl.ds(i * step, step)] for plane in sketch], total)
        negative = lax.shift_right_logical(
            lax.bitcast_convert_type(total, jnp.int32), jnp.full_like(total, 31, jnp.int32)
        )
        # The columns of one byte are in one thread: [tile, bits, bytes].
        bit = i * shape[1] + lax.broadcasted_iota(jnp.int32, (1, shape[1], 1), 1)
        return data | jnp.sum(negative.reshape(shape) << bit, axis=1)

    # A loop, because the compiler would load the whole sketch at once.
    return lax.fori_loop(0, width // step, sign_bits, jnp.zeros((plan.tile, size), jnp.int32))
