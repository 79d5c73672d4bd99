"""Exact causal attention of a chunk over itself by a kernel, for cases that cuDNN does not take, such as float32.

It shares the products and the softmax of the full-precision tokens of a decoding step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.full_precision_triton import attend_tile, no_keys, terms_of
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial
from pallas_kernels.numerics import LOG2_E, power_of_two

DIMS = (64, 80, 96, 128, 192, 256)
"""Head dims of the kernel."""

TILE_CHANNELS, LARGEST_TILE, LEAST_TILE = 32 * 128, 32, 16
"""Channels of a tile of queries or keys, and most and least tokens of one."""

WIDE = 256
"""Channels from which on a program has eight warps."""


def check_supported(query: jax.ShapeDtypeStruct | jax.Array) -> None:
    """Raises NotImplementedError, naming value and limit, for queries that the kernel does not take.

    Args:
        query: [b, t, h_q, d].
    """
    if query.shape[3] not in DIMS:
        raise NotImplementedError(f"the Triton kernel of prompts has head dims {DIMS}, got {query.shape[3]}")


def attend_causal(
    query: jax.Array, key: jax.Array, value: jax.Array, *, options: LogitOptions, interpret: bool
) -> Partial:
    """Causal attention of tokens over themselves; one program per block of queries and query head.

    Args:
        query: [b, t, h_q, d].
        key: [b, t, h_kv, d].
        value: [b, t, h_kv, d].
        options: Logit options.
        interpret: Whether the kernel runs as jnp.

    Raises:
        NotImplementedError: For head dims other than DIMS.
    """
    check_supported(query)
    b, t, h_q, d = query.shape
    tile = max(LEAST_TILE, min(LARGEST_TILE, TILE_CHANNELS // power_of_two(d), power_of_two(t)))
    row = jax.ShapeDtypeStruct((b, t, h_q), jnp.float32)
    acc, peak, total = pl.pallas_call(
        functools.partial(_body, options=options, tile=tile, interpret=interpret),
        grid=(-(-t // tile), h_q, b),
        out_shape=[jax.ShapeDtypeStruct(query.shape, jnp.float32), row, row],
        compiler_params=plt.CompilerParams(num_warps=8 if power_of_two(d) >= WIDE else 4, num_stages=1),
        interpret=interpret,
        name="prompt",
    )(query, key, value)
    return Partial(acc, peak, total)


def _body(
    query: Any,
    key: Any,
    value: Any,
    out_acc: Any,
    out_peak: Any,
    out_total: Any,
    *,
    options: LogitOptions,
    tile: int,
    interpret: bool,
) -> None:
    """The kernel body. All arguments are references."""
    count, heads, d = query.shape[1:]
    block, head, sequence = (pl.program_id(axis) for axis in range(3))
    kv_head = lax.div(head, jnp.int32(heads // key.shape[2]))
    shape = (tile, power_of_two(d))
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)  # [tile, d padded]
    step = lax.broadcasted_iota(jnp.int32, (tile,), 0)  # [tile]

    def load(ref: Any, token: jax.Array, number: jax.Array) -> jax.Array:
        mask = jnp.broadcast_to((token < count)[:, None], shape) & (channel < d)
        at = (*(jnp.broadcast_to(i, shape) for i in (sequence, token[:, None], number)), channel)
        return plt.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype))  # [tile, d padded]

    token = block * tile + step  # [queries]
    queries = load(query, token, head).astype(jnp.float32)  # [queries, d padded]

    def fold(index: jax.Array, state: tuple) -> tuple:
        key_token = index * tile + step  # [tile]
        k, v = (load(ref, key_token, kv_head) for ref in (key, value))
        return attend_tile(
            state,
            queries,
            (k, v),
            (key_token, key_token < count),
            token,
            options,
            query_terms=terms_of(query.dtype),
            interpret=interpret,
        )

    first = jnp.int32(0)
    if options.sliding_window is not None:
        first = lax.div(jnp.maximum(block * tile - (options.sliding_window - 1), 0), jnp.int32(tile))
    acc, peak, total = lax.fori_loop(first, block + 1, fold, no_keys(queries))
    at = [jnp.broadcast_to(i, shape) for i in (sequence, token[:, None], head)]
    mask = jnp.broadcast_to((token < count)[:, None], shape) & (channel < d)
    plt.store(out_acc.at[(*at, channel)], acc, mask=mask)
    for ref, x in ((out_peak, peak * (1.0 / LOG2_E)), (out_total, total)):
        at = [jnp.broadcast_to(i, (tile,)) for i in (sequence, token, head)]
        plt.store(ref.at[tuple(at)], x, mask=token < count)
