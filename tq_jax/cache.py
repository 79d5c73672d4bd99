"""The compressed KV cache: its spec, its arrays and their bytes.

The first `sink_tokens` and the latest `window` tokens of a sequence are kept in full precision. When a token leaves the
window, it is quantized and moves to the packed pages. The rows of a cache are independent: each holds one sequence, or,
for a whole model, one sequence of one layer.

    tokens   0 .. sinks-1 | sinks .. sinks+compressed-1 | sinks+compressed .. length-1
    live in  exact slots  | pages, in order             | exact ring

If the spec has a sliding window, older tokens are overwritten: the pages are then a ring of pages, or, in full
precision, the exact ring is all there is. `pallas_kernels.append.slots` states where a token lies.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.pages import Pages, empty_pages
from pallas_kernels.pytree import pytree
from tq_jax.cache_spec import CacheSpec
from tq_jax.quantizer import Quantizer, QuantizerSpec, is_traced, make_quantizer
from tq_jax.statistics import KeyStatistics, empty_statistics, given_statistics, require_statistics


@pytree
class Cache:
    """The arrays of a cache; a pytree. `init_cache` makes one, `append` adds tokens to it.

    Attributes:
        pages: Packed pages, pages_per_row of row r from r * pages_per_row on. None if no token is ever compressed.
        exact_keys: [rows, h_kv, sinks + ring, d], full-precision keys: the sink slots, then the ring. bfloat16 is held
            as its bits in uint16, see `to_storage`.
        exact_values: Full-precision values, shaped like the keys.
        length: int32 [rows], tokens appended.
        compressed: int32 [rows], tokens that left the ring: those in the pages and those overwritten there. In full
            precision, all of them are gone.
        overflow: bool [rows], set if, under jit, a chunk did not fit and was left out; `attend` then returns NaN.
        statistics: Key statistics; None if keys are neither centred nor smoothed.
        key_quantizer: Quantizer of the keys of all rows; None in full precision.
        value_quantizer: Quantizer of the values of all rows; None in full precision.
        spec: The spec (static).
    """

    pages: Pages | None
    exact_keys: Shaped[Array, "rows h_kv slots d"]
    exact_values: Shaped[Array, "rows h_kv slots d"]
    length: Int[Array, "rows"]
    compressed: Int[Array, "rows"]
    overflow: Bool[Array, "rows"]
    statistics: KeyStatistics | None
    key_quantizer: Quantizer | None
    value_quantizer: Quantizer | None
    spec: CacheSpec = dataclasses.field(metadata={"static": True})

    @property
    def rows(self) -> int:
        """Independent sequences."""
        return self.length.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the cache: pages, ring, sinks, statistics, rotations, counters."""
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))


def init_cache(
    spec: CacheSpec,
    batch: int,
    *,
    seed: int = 0,
    statistics: tuple[Float[Array, "*lead h_kv d"], Float[Array, "*lead h_kv d"]] | None = None,
    key_quantizer: Quantizer | None = None,
    value_quantizer: Quantizer | None = None,
) -> Cache:
    """Makes an empty cache.

    Args:
        spec: What the cache holds.
        batch: Rows of the cache: sequences, or sequences times layers. Zero is allowed.
        seed: Seed of the key quantizer; the value quantizer has seed + 1.
        statistics: Key mean and channel weights known beforehand, [h_kv, d] or [rows, h_kv, d] each. By default they
            are taken from the tokens at hand when the first one is compressed (usually the whole prompt).
        key_quantizer: Quantizer of spec.key to use in place of a new one, e.g. one with outlier channels.
        value_quantizer: Quantizer of spec.value to use in place of a new one.

    Returns:
        The cache.

    Raises:
        ValueError: For a negative batch, statistics or quantizers that do not fit the spec, or, outside jit, means that
            are not finite or weights that are not positive and finite.

    Example:
        >>> cache = init_cache(CacheSpec.recommended(2, 64, max_tokens=512), batch=2)
        >>> cache.length.tolist(), cache.nbytes < init_cache(
        ...     CacheSpec.full_precision(num_kv_heads=2, head_dim=64, max_tokens=512), batch=2).nbytes
        ([0, 0], True)
    """
    if batch < 0:
        raise ValueError(f"expected a batch of at least 0 rows, got {batch}")
    quantizers = [
        _quantizer(spec.key, key_quantizer, seed, "key"),
        _quantizer(spec.value, value_quantizer, seed + 1, "value"),
    ]
    exact = to_storage(spec, jnp.zeros((batch, spec.num_kv_heads, spec.sinks + spec.ring, spec.head_dim), spec.dtype))
    return Cache(
        pages=_empty_pages(spec, batch),
        exact_keys=exact,
        exact_values=jnp.zeros_like(exact),
        length=jnp.zeros(batch, jnp.int32),
        compressed=jnp.zeros(batch, jnp.int32),
        overflow=jnp.zeros(batch, bool),
        statistics=_statistics(spec, batch, statistics),
        key_quantizer=quantizers[0],
        value_quantizer=quantizers[1],
        spec=spec,
    )


def resize(cache: Cache, max_tokens: int) -> Cache:
    """The cache with room for another number of tokens per row; the tokens in it stay as they are.

    Args:
        cache: The cache.
        max_tokens: Tokens that a row of the new cache can hold.

    Returns:
        A new cache; pages are copied. Under jit it can only grow.

    Raises:
        ValueError: If a row holds more than max_tokens tokens, or if sinks and window would change: before and after, a
            compressed cache must have room for both.

    Example:
        >>> cache = init_cache(CacheSpec.recommended(2, 64, max_tokens=512), batch=1)
        >>> resize(cache, 1024).spec.pages_per_row
        7
    """
    old = cache.spec
    new = old.with_room(max_tokens)
    if old.compressed and (new.sinks, new.ring) != (old.sinks, old.ring):
        raise ValueError(
            f"expected at least {old.sink_tokens + old.window} tokens per row (sinks and window) before and after, "
            f"got {old.max_tokens} and {max_tokens}"
        )
    if max_tokens < old.max_tokens and is_traced(cache.length):
        raise ValueError(f"expected at least max_tokens={old.max_tokens} under jit, got {max_tokens}")
    if max_tokens < old.max_tokens and (longest := int(jnp.max(cache.length, initial=0))) > max_tokens:
        raise ValueError(f"expected at least max_tokens={longest}, the longest row, got {max_tokens}")

    def paged(pool: Array, empty: Array) -> Array:
        pages = pool.reshape(cache.rows, old.pages_per_row, *pool.shape[1:])
        return _cut(pages, 1, new.pages_per_row).reshape(empty.shape)

    pages = _empty_pages(new, cache.rows)
    if pages is not None and cache.pages is not None:
        pages = jax.tree.map(paged, cache.pages, pages)
    exact = {name: _cut(getattr(cache, name), 2, new.sinks + new.ring) for name in ("exact_keys", "exact_values")}
    return dataclasses.replace(cache, pages=pages, spec=new, **exact)


def _cut(array: Array, axis: int, size: int) -> Array:
    """The first `size` entries along an axis, with zeros behind them if there are fewer."""
    padding = [(0, max(size - n, 0) if i == axis else 0) for i, n in enumerate(array.shape)]
    return lax.slice_in_dim(jnp.pad(array, padding), 0, size, axis=axis)


def to_storage(spec: CacheSpec, tokens: Float[Array, "..."]) -> Shaped[Array, "..."]:
    """Full-precision tokens as the cache holds them: in its dtype, bfloat16 as bits.

    XLA's CPU compiler widens the whole operand of a bfloat16 scatter to float32, but not that of an integer scatter.
    """
    tokens = tokens.astype(spec.dtype)
    return lax.bitcast_convert_type(tokens, jnp.uint16) if spec.dtype == "bfloat16" else tokens


def from_storage(spec: CacheSpec, stored: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Inverse of `to_storage`, widened to float32."""
    tokens = lax.bitcast_convert_type(stored, jnp.bfloat16) if spec.dtype == "bfloat16" else stored
    return tokens.astype(jnp.float32)


def require_no_explicit_axes(op: str, tree: Any) -> None:
    """Raises NotImplementedError for arrays that are spread over explicit axes of a mesh, as `jax.make_mesh` has them.

    Args:
        op: The operation, for the message.
        tree: Its arrays; None is skipped.
    """
    for array in jax.tree.leaves(tree):
        kind = jax.typeof(array)
        if any(axes is not None for axes in kind.sharding.spec):
            raise NotImplementedError(
                f"{op}: arrays spread over explicit axes of a mesh are not supported, got {kind.str_short()}: call it "
                "inside jax.shard_map, or make the mesh with axis_types of jax.sharding.AxisType.Auto"
            )


def require_row_integers(batch: int, **arrays: Array | None) -> None:
    """Raises ValueError unless each named array is None or holds one integer per row of a chunk."""
    for name, array in arrays.items():
        if array is not None and (array.shape != (batch,) or not jnp.issubdtype(array.dtype, jnp.integer)):
            raise ValueError(f"expected {name} to be integers of shape ({batch},), got {array.dtype} {array.shape}")


def require_counters(spec: CacheSpec, length: list[int], compressed: list[int]) -> None:
    """Raises ValueError unless each row can hold its `length` tokens with `compressed` of them in its pages."""
    for total, packed in zip(length, compressed, strict=True):
        exact = total - min(total, spec.sinks) - packed
        if not 0 <= total <= spec.max_tokens or packed < 0 or not 0 <= exact <= spec.ring:
            raise ValueError(
                f"expected at most {spec.max_tokens} tokens per row, all compressed but the first {spec.sinks} and at "
                f"most {spec.ring} of the latest; got length={length}, compressed={compressed}"
            )


def _empty_pages(spec: CacheSpec, rows: int) -> Pages | None:
    """Pages of zeros for all rows; None if no token is ever compressed."""
    if not spec.pages_per_row:
        return None
    assert spec.key is not None and spec.value is not None
    return empty_pages(rows * spec.pages_per_row, spec.num_kv_heads, spec.page_size, spec.key.format, spec.value.format)


def _quantizer(spec: QuantizerSpec | None, given: Quantizer | None, seed: int, name: str) -> Quantizer | None:
    if given is not None and given.spec != spec:
        raise ValueError(f"expected a {name} quantizer of {spec}, got {given.spec}")
    return given if given is not None or spec is None else make_quantizer(spec, seed=seed)


def _statistics(spec: CacheSpec, batch: int, given: tuple[Array, Array] | None) -> KeyStatistics | None:
    if given is None:
        return empty_statistics(batch, spec.num_kv_heads, spec.head_dim) if spec.has_statistics else None
    if not spec.has_statistics:
        raise ValueError("expected statistics=None for a cache that neither centres nor smooths keys, got statistics")
    one = (spec.num_kv_heads, spec.head_dim)
    for name, array in zip(("mean", "weight"), given, strict=True):
        if array.shape not in (one, (batch, *one)):
            raise ValueError(f"expected a {name} of shape {one} or {(batch, *one)}, got {tuple(array.shape)}")
    if not is_traced(given):
        require_statistics(*(np.asarray(array, np.float32) for array in given))
    return given_statistics(batch, *given)
