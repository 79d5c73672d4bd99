"""Appending to a cache in at most four launches: leave, encode keys, encode values, enter.

Nothing is computed between them, every size is static and every counter is read and written where it lies, so that
another framework can launch the same kernels on the same arrays and a CUDA graph can repeat them.
"""

import dataclasses

from jaxtyping import Array, Float, Int

from pallas_kernels.append.window_triton import Window, WindowPlan, enter, leave
from pallas_kernels.decode.fused import CacheArrays
from pallas_kernels.encode import triton as encode
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


def append_cache(
    keys: Float[Array, "rows t h_kv d"],
    values: Float[Array, "rows t h_kv d"],
    cache: CacheArrays,
    plan: AppendPlan,
    *,
    key: Encoder | None,
    value: Encoder | None,
    counts: Int[Array, "rows"] | None = None,
) -> CacheArrays:
    """Appends a chunk to every row, in place where the arrays are donated or another framework's.

    Args:
        keys: Of the type of full-precision tokens.
        values: Likewise.
        cache: The cache; bases and sketch are not read. `overflow` is uint8.
        plan: What is static.
        key: How keys are encoded; None without pages.
        value: Likewise.
        counts: int32, tokens of each row's chunk that exist; t by default.

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
    left = leave(keys, values, kept, counts, window)
    if window.leaves:
        assert pages is not None and key is not None and value is not None
        pages = encode.encode_pages(
            left.keys,
            left.values,
            pages,
            left.slots,
            key=key,
            value=value,
            mean=cache.mean,
            weight=cache.weight,
            interpret=plan.interpret,
        )
    entered = enter(keys, values, kept, left.counters, window)
    return dataclasses.replace(
        cache,
        pages=pages,
        exact_keys=cache.exact_keys if entered.keys is None else entered.keys,
        exact_values=cache.exact_values if entered.values is None else entered.values,
        length=entered.length,
        compressed=entered.compressed,
        overflow=entered.overflow,
    )
