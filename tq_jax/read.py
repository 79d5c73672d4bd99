"""Reading packed tokens back into full precision, for attention that is not the cache's own."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lookup import decode
from pallas_kernels.pages import Gathered, read_pages
from tq_jax.paged import Statistics
from tq_jax.quantizer import Quantizer, dequantize, from_rotated


def read_packed(
    pages: Gathered,
    table: Int[Array, "b n"],
    quantizers: tuple[Quantizer, Quantizer],
    statistics: Statistics | None = None,
) -> tuple[Float[Array, "b h_kv s d"], Float[Array, "b h_kv s d"]]:
    """Keys and values of n pages of every sequence, decoded to the original basis.

    Args:
        pages: The pools, or the blocks that hold the pages.
        table: Pages of each sequence.
        quantizers: Quantizers of keys and of values.
        statistics: Mean and channel weights [b, h_kv, d] of the keys; None for keys that are stored as they are.

    Returns:
        Keys and values, float32, s = n * page_size tokens of each sequence. Slots that hold no token yet may be NaN.

    Example:
        >>> from tq_jax import CacheSpec, append, init_cache
        >>> spec = CacheSpec.recommended(1, 16, 64, 8, 8, window=0, sink_tokens=0, page_size=32, center_keys=False)
        >>> x = jnp.sin(jnp.arange(64.0 * 16)).reshape(1, 64, 1, 16)
        >>> cache = append(init_cache(spec, 1), x, x)
        >>> pairs = cache.key_quantizer, cache.value_quantizer
        >>> known = cache.statistics.mean, cache.statistics.weight
        >>> keys, values = read_packed(cache.pages, jnp.array([[0, 1]]), pairs, known)
        >>> bool(jnp.abs(keys[0, 0] - x[0, :, 0]).max() < 0.02), values.shape
        (True, (1, 1, 64, 16))
    """
    key_codes, value_codes = read_pages(pages, table)
    key, value = quantizers
    keys = dequantize(key, key_codes)
    values = from_rotated(value, jnp.swapaxes(decode(value_codes, value.spec.format, axis=-2), -1, -2))
    keys, values = (jnp.moveaxis(x, 2, 1).reshape(x.shape[0], x.shape[2], -1, x.shape[4]) for x in (keys, values))
    if statistics is not None:
        mean, weight = (x[:, :, None] for x in statistics)
        keys = keys / weight + mean
    return keys, values
