"""Pages as dense tokens in obvious jnp: the definition."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dequantize.arguments import DequantizeArguments, matrix_gain
from pallas_kernels.format import Code, CodebookFormat, VectorFormat
from pallas_kernels.lookup import decode, residual_signs
from pallas_kernels.pages import read_pages


def dequantize_pages(
    x: DequantizeArguments, *, tokens: int, dtype: Any
) -> tuple[Float[Array, "tokens h d"], Float[Array, "tokens h d"]]:
    """Dense keys and values; zero at places of no token. Arguments as for `pallas_kernels.dequantize`."""
    keys, values = read_pages(x.pages, x.block_table)  # batch axes [b, n, h_kv], tokens last for values
    key, value = _coordinates(keys, x.key_format, -1), jnp.swapaxes(_coordinates(values, x.value_format, -2), -1, -2)
    found = []
    for coordinates, matrix, fmt in ((key, x.key_matrix, x.key_format), (value, x.value_matrix, x.value_format)):
        rows = matrix.astype(jnp.float32) / matrix_gain(fmt)
        found.append(jnp.einsum("bnhsk,kd->bnshd", coordinates, rows, precision="highest"))
    if x.mean is not None and x.weight is not None:
        found[0] = found[0] / x.weight[:, None, None] + x.mean[:, None, None]
    token = jnp.arange(x.block_table.shape[1] * x.page_size, dtype=jnp.int32)[None]
    place = jnp.where(token < x.lengths[:, None], x.starts[:, None] + token, tokens)  # [b, n * page_size]

    def scatter(dense: Array) -> Array:
        dense = dense.reshape(*place.shape, *dense.shape[3:])[:, :, x.heads]
        empty = jnp.zeros((tokens, *dense.shape[2:]), dtype)
        return empty.at[place].set(dense.astype(dtype), mode="drop")

    key, value = map(scatter, found)
    return key, value


def _coordinates(code: Code, fmt: VectorFormat, axis: int) -> jax.Array:
    """Coordinates of vectors along an axis, float32, and behind them the scaled signs of a sketch."""
    found = decode(code, fmt, axis=axis)
    if not isinstance(fmt, CodebookFormat) or not fmt.residual:
        return found
    assert code.residual is not None and axis == -1
    signs = residual_signs(code, fmt) * code.residual.astype(jnp.float32)[..., None]
    return jnp.concatenate([found, signs], axis=-1)
