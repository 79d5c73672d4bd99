"""Appending to a cache in at most four launches: leave, encode keys, encode values, enter.

If a chunk has few tokens, one launch encodes both keys and values. Nothing is computed between the launches, every size
is static and every counter is read and written in place, so that another framework can launch the same kernels on the
same arrays and a CUDA graph can repeat them. docs/decode_step.md draws the launches.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from pallas_kernels.append.window_triton import NewTokens, Window, WindowPlan, enter, leave
from pallas_kernels.attention.whole_cache import CacheArrays
from pallas_kernels.encode import launch_triton as encode
from pallas_kernels.encode.arguments import EncodeArguments
from pallas_kernels.encode.encoder import Encoder


@dataclasses.dataclass(frozen=True)
class AppendPlan:
    """Static configuration of appending.

    Attributes:
        sink_slots: Full-precision slots for the first tokens.
        max_tokens: Tokens that a cache row can hold; a chunk that does not fit is left out and its row marked as
            overflowed.
        interpret: Whether the kernels run as jnp.
    """

    sink_slots: int
    max_tokens: int
    interpret: bool = False


def check_append(cache: CacheArrays, key: Encoder | None, value: Encoder | None) -> None:
    """Raises NotImplementedError, naming value and limit, for a cache or encoders that the kernels do not support.

    Args:
        cache: The cache.
        key: Encoder of keys; None without pages.
        value: Encoder of values; None without pages.
    """
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
    """Appends a chunk to every given cache row, in place where the arrays are donated or another framework's.

    Args:
        keys: New keys, of the type of full-precision tokens; bfloat16 may come as its bits in uint16.
        values: New values, of the type of the keys.
        cache: The cache; bases and sketch are not read. `overflow` is bool or uint8.
        plan: Static configuration.
        key: Encoder of keys; None without pages.
        value: Encoder of values; None without pages.
        counts: int32, tokens of each chunk that exist; t by default.
        rows: int32, the cache row of each chunk, all different; all in order by default.

    Returns:
        The cache with the chunk.

    Raises:
        NotImplementedError: For shapes or formats outside the kernels' limits.
    """
    pages, window = cache.pages, _window_plan(cache, plan)
    exact = (cache.exact_keys, cache.exact_values) if cache.exact_keys.size else (None, None)
    kept = Window(*exact, cache.length, cache.compressed, cache.overflow)
    new = NewTokens(keys, values, counts, rows)
    leaving = leave(new, kept, window)
    if window.leaves:
        assert pages is not None and key is not None and value is not None
        tokens = EncodeArguments(
            _numbers(leaving.keys),
            _numbers(leaving.values),
            leaving.page_slots,
            key=key,
            value=value,
            mean=cache.mean,
            weight=cache.weight,
            rows=rows,
        )
        pages = encode.encode_pages(tokens, pages, interpret=plan.interpret)
    entered = enter(new, kept, leaving.counters, window)
    return dataclasses.replace(
        cache,
        pages=pages,
        exact_keys=cache.exact_keys if entered.keys is None else entered.keys,
        exact_values=cache.exact_values if entered.values is None else entered.values,
        length=entered.length,
        compressed=entered.compressed,
        overflow=entered.overflow,
    )


def _window_plan(cache: CacheArrays, plan: AppendPlan) -> WindowPlan:
    """Static configuration of the kernels of the window."""
    pages = cache.pages
    return WindowPlan(
        sink_slots=plan.sink_slots,
        max_tokens=plan.max_tokens,
        pages_per_row=0 if pages is None else pages.count // cache.length.shape[0],
        page_size=1 if pages is None else pages.page_size,
        leaves=pages is not None,
        interpret=plan.interpret,
    )


def _numbers(tokens: jax.Array) -> jax.Array:
    """Tokens as bfloat16 if they are its bits."""
    return lax.bitcast_convert_type(tokens, jnp.bfloat16) if tokens.dtype == jnp.uint16 else tokens
