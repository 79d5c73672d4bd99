"""Dense keys and values of compressed tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int

from pallas_kernels.blocks import Blocks
from pallas_kernels.dequantize import DequantizeArguments, dequantize_pages, matrix_gain
from pallas_kernels.dispatch import Implementation
from pallas_kernels.pages import Pages
from tq_jax.quantizer import Quantizer, from_rotated, sketch_gain


def reconstruction_matrix(q: Quantizer) -> Float16[Array, "coordinates dim"]:
    """The matrix by which `pallas_kernels.dequantize` leaves the rotated basis of a quantizer.

    Row i is the vector that coordinate i stands for; behind these come rows of the signs of a Prod sketch.

    Args:
        q: The quantizer.

    Example:
        >>> import tq_jax as tq
        >>> q = tq.make_quantizer(tq.QuantizerSpec(dim=64, bits=4))
        >>> matrix = reconstruction_matrix(q)
        >>> matrix.shape, sorted({float(x) for x in jnp.abs(matrix).flatten()})
        ((64, 64), [1.0])
    """
    rows = from_rotated(q, jnp.eye(q.spec.dim, dtype=jnp.float32))
    if q.sketch is not None:
        rows = jnp.concatenate([rows, from_rotated(q, q.sketch * sketch_gain(q.spec.dim))])
    return (rows * matrix_gain(q.spec.format)).astype(jnp.float16)


@functools.partial(jax.jit, static_argnames=("tokens", "dtype", "implementation"))
def dense_tokens(
    pages: Pages | Blocks,
    quantizers: tuple[Quantizer, Quantizer],
    table: Int[Array, "b n"],
    lengths: Int[Array, "b"],
    starts: Int[Array, "b"],
    heads: Int[Array, "h"],
    *,
    tokens: int,
    dtype: Any,
    statistics: tuple[Float[Array, "b h_kv d"], Float[Array, "b h_kv d"]] | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "tokens h d"], Float[Array, "tokens h d"]]:
    """Dense keys and values of sequences over packed pages.

    Args:
        pages: The pools, or the blocks that hold the pages.
        quantizers: Quantizers of keys and of values.
        table: Page of each run of page_size tokens of each sequence.
        lengths: Tokens of each sequence.
        starts: Place of the first token of each sequence in the result.
        heads: KV heads that are wanted.
        tokens: Tokens of the result.
        dtype: Type of the result.
        statistics: Statistics of the keys; None for keys that are stored as they are.
        implementation: See `pallas_kernels.dispatch.Implementation`.

    Returns:
        Keys and values, as `pallas_kernels.dequantize.dequantize_pages` gives them.
    """
    key, value = quantizers
    mean, weight = (None, None) if statistics is None else statistics
    arguments = DequantizeArguments(
        pages,
        reconstruction_matrix(key),
        reconstruction_matrix(value),
        table,
        lengths,
        starts,
        heads,
        key_format=key.spec.format,
        value_format=value.spec.format,
        mean=mean,
        weight=weight,
    )
    return dequantize_pages(arguments, tokens=tokens, dtype=dtype, implementation=implementation)
