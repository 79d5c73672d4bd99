"""Appending to a cache in at most four launches: leave, encode keys, encode values, enter.

Keys and values of few tokens are encoded in one. Nothing is computed between them, every size is static and every
counter is read and written where it lies, so that another framework can launch the same kernels on the same arrays and
a CUDA graph can repeat them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from pallas_kernels.append.window_triton import New, Window, WindowPlan, enter, leave
from pallas_kernels.attention.whole_cache import CacheArrays
from pallas_kernels.encode import launch_triton as encode
from pallas_kernels.encode.arguments import EncodeArguments
from pallas_kernels.encode.encoder import Encoder


@dataclasses.dataclass(frozen=True)
class AppendPlan:
    """What is static about appending.

    Attributes:
        sinks: Full-precision slots for the first tokens.
        max_tokens: Tokens that a row can hold; a chunk that does not fit is left out and its row marked as overflowed.
        interpret: Whether the kernels run as jnp.
    """

    sinks: int
    max_tokens: int
    interpret: bool = False


def check_append(cache: CacheArrays, key: Encoder | None, value: Encoder | None) -> None:
    """Raises NotImplementedError, naming value and limit, for what the kernels do not do."""
    dim = cache.exact_keys.shape[-1]
    if dim not in encode.DIMS:
        raise NotImplementedError(f"the Triton kernels have head dims {encode.DIMS}, got {dim}")
    if cache.pages is not None:
        assert key is not None and value is not None
        encode.check_supported(cache.pages, key, value)


def append_cache(
    keys: Shaped[Array, "b t h_kv d"],
    values: Shaped[Array, "b t h_kv d"],
    cache: CacheArrays,
    plan: AppendPlan,
    *,
    key: Encoder | None,
    value: Encoder | None,
    counts: Int[Array, "b"] | None = None,
    rows: Int[Array, "b"] | None = None,
) -> CacheArrays:
    """Appends a chunk to every row, in place where the arrays are donated or another framework's.

    Args:
        keys: Of the type of full-precision tokens; bfloat16 may come as its bits in uint16.
        values: Likewise.
        cache: The cache; bases and sketch are not read. `overflow` is bool, or uint8.
        plan: What is static.
        key: How keys are encoded; None without pages.
        value: Likewise.
        counts: int32, tokens of each row's chunk that exist; t by default.
        rows: int32, the rows that chunks are for, all different; all in order by default.

    Returns:
        The cache with what has changed.

    Raises:
        NotImplementedError: For shapes or formats outside the kernels' limits.
    """
    pages = cache.pages
    window = WindowPlan(
        sinks=plan.sinks,
        max_tokens=plan.max_tokens,
        pages_per_row=0 if pages is None else pages.keys.packed.shape[0] // cache.length.shape[0],
        page_size=1 if pages is None else pages.keys.packed.shape[2],
        leaves=pages is not None,
        interpret=plan.interpret,
    )
    exact = (cache.exact_keys, cache.exact_values) if cache.exact_keys.size else (None, None)
    kept = Window(*exact, cache.length, cache.compressed, cache.overflow)
    new = New(keys, values, counts, rows)
    left = leave(new, kept, window)
    if window.leaves:
        assert pages is not None and key is not None and value is not None
        tokens = EncodeArguments(
            _numbers(left.keys),
            _numbers(left.values),
            left.slots,
            key=key,
            value=value,
            mean=cache.mean,
            weight=cache.weight,
            rows=rows,
        )
        pages = encode.encode_pages(tokens, pages, interpret=plan.interpret)
    entered = enter(new, kept, left.counters, window)
    return dataclasses.replace(
        cache,
        pages=pages,
        exact_keys=cache.exact_keys if entered.keys is None else entered.keys,
        exact_values=cache.exact_values if entered.values is None else entered.values,
        length=entered.length,
        compressed=entered.compressed,
        overflow=entered.overflow,
    )


def _numbers(tokens: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(tokens, jnp.bfloat16) if tokens.dtype == jnp.uint16 else tokens
