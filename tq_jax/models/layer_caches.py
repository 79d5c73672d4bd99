"""The cache of a decoder: one `tq_jax.Cache` of all layers, or, if layers see different windows, one per window.

Layers that see a sliding window keep its tokens and no others. Cache row `layer * b + sequence` of b sequences belongs
to a layer of a sequence; in `LayerCaches`, layers are counted among those of the same window.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from pallas_kernels.pytree import pytree
from tq_jax.models.config import DecoderConfig


@pytree
class LayerCaches:
    """Caches of the layers of a decoder whose layers see different windows; a pytree.

    Arrays of all rows have the order `layer * b + sequence`, as those of one cache of all layers.

    Attributes:
        caches: A cache for each window, in the order in which windows first appear.
        windows: Sliding window of each layer, see `DecoderConfig.layer_windows` (static).

    Example:
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48, sliding_window=16, local_layers=(True, True, False))
        >>> spec = tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=8, max_tokens=100)
        >>> cache = init_layers(config, spec, batch=5)
        >>> cache.rows, [(one.rows, one.spec.ring) for one in cache.caches]
        (15, [(10, 16), (5, 100)])
    """

    caches: tuple[tq.Cache, ...]
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})

    @property
    def spec(self) -> tq.CacheSpec:
        """The spec that all caches share, which is that of a layer that sees all tokens."""
        return dataclasses.replace(self.caches[0].spec, sliding_window=None)

    @property
    def rows(self) -> int:
        """Rows of all caches: layers times sequences."""
        return sum(cache.rows for cache in self.caches)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.rows // len(self.windows)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of all caches."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def length(self) -> jax.Array:
        """int32 [rows], tokens appended."""
        return self._of_rows("length")

    @property
    def compressed(self) -> jax.Array:
        """int32 [rows], tokens that left the exact ring."""
        return self._of_rows("compressed")

    @property
    def overflow(self) -> jax.Array:
        """Bool [rows], whether a chunk did not fit and was left out."""
        return self._of_rows("overflow")

    @property
    def kinds(self) -> tuple[int | None, ...]:
        """The window of each cache."""
        return tuple(dict.fromkeys(self.windows))

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Of each layer, the number of its cache and its number among the layers of that cache."""
        return tuple(
            (self.kinds.index(window), self.windows[:layer].count(window)) for layer, window in enumerate(self.windows)
        )

    def _of_rows(self, name: str) -> jax.Array:
        """An array with an entry per row, of all layers."""
        arrays = [getattr(cache, name).reshape(-1, self.batch) for cache in self.caches]
        starts = np.cumsum([0, *(array.shape[0] for array in arrays)])
        layers = np.array([starts[kind] + index for kind, index in self.places], np.int32)
        return jnp.concatenate(arrays)[layers].reshape(-1)


Caches = tq.Cache | LayerCaches
"""A cache of all layers of a decoder."""


def init_layers(config: DecoderConfig, spec: tq.CacheSpec, *, batch: int) -> Caches:
    """An empty cache for all layers.

    Args:
        config: The decoder.
        spec: Spec of the cache of a layer that sees all tokens.
        batch: Number of sequences.

    Returns:
        One cache of `num_layers * batch` rows if all layers are alike, else a `LayerCaches`.

    Raises:
        ValueError: For a spec with a sliding window.
    """
    if spec.sliding_window is not None:
        raise ValueError(
            f"cache spec sliding_window: expected None (the decoder says that of each layer), got {spec.sliding_window}"
        )
    windows = config.layer_windows
    caches = [
        tq.init_cache(dataclasses.replace(spec, sliding_window=window), batch=windows.count(window) * batch)
        for window in dict.fromkeys(windows)
    ]
    return caches[0] if len(caches) == 1 else LayerCaches(tuple(caches), windows)


def require_layers(config: DecoderConfig, cache: Caches, *, batch: int) -> None:
    """Raises ValueError unless a cache has a row per layer and sequence, and the tokens that each layer sees."""
    expected = config.num_layers * batch
    if cache.rows != expected:
        raise ValueError(
            f"cache: expected {expected} rows ({config.num_layers} layers x {batch} sequences), got {cache.rows}"
        )
    windows = config.layer_windows
    kept = cache.windows if isinstance(cache, LayerCaches) else (cache.spec.sliding_window,) * config.num_layers
    if any(has is not None and (window is None or window > has) for has, window in zip(kept, windows, strict=True)):
        raise ValueError(f"cache: expected layers that keep the tokens they see, {windows}, got {kept}")


def layer_of(cache: Caches, rows: jax.Array, *, window: int | None) -> tuple[tq.Cache, jax.Array]:
    """The cache of the layers of a window, and its rows that are the given rows of all layers.

    Args:
        cache: The cache.
        rows: int32, rows of layers of that window, counted over all layers.
        window: The sliding window.
    """
    if isinstance(cache, tq.Cache):
        return cache, rows
    own = cache.caches[cache.kinds.index(window)]
    index = jnp.asarray(np.array([index for _, index in cache.places], np.int32))
    layer, sequence = rows // cache.batch, rows % cache.batch
    return own, index[layer] * cache.batch + sequence


def with_layer(cache: Caches, new: tq.Cache, *, window: int | None) -> Caches:
    """The cache with another in place of that of the layers of a window; inverse of `layer_of`."""
    if isinstance(cache, tq.Cache):
        return new
    kind = cache.kinds.index(window)
    return dataclasses.replace(cache, caches=(*cache.caches[:kind], new, *cache.caches[kind + 1 :]))


def map_caches(function: Callable[..., tq.Cache], cache: Caches, *arrays: Any) -> Caches:
    """Applies a function to every `tq_jax.Cache` of a cache.

    Args:
        function: Gets a cache, and of each further argument the rows of that cache.
        cache: The cache.
        *arrays: Pytrees of arrays whose first axis is that of all rows.

    Returns:
        The cache with the new ones in their places.

    Example:
        >>> import functools
        >>> cache = tq.init_cache(tq.CacheSpec.recommended(2, 64, max_tokens=512), batch=1)
        >>> map_caches(functools.partial(tq.resize, max_tokens=1024), cache).spec.max_tokens
        1024
    """
    if isinstance(cache, tq.Cache):
        return function(cache, *arrays)
    # Slices of arrays that were put together from runs of layers cost nothing under jit.
    windows, batch = cache.windows, cache.batch
    starts = [layer for layer, window in enumerate(windows) if layer == 0 or window != windows[layer - 1]]
    runs = [
        (windows[first], slice(first * batch, end * batch))
        for first, end in itertools.pairwise([*starts, len(windows)])
    ]

    def of(window: int | None) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jnp.concatenate([x[run] for own, run in runs if own == window])

    parts = zip(cache.kinds, cache.caches, strict=True)
    caches = [function(one, *jax.tree.map(of(window), arrays)) for window, one in parts]
    return dataclasses.replace(cache, caches=tuple(caches))


def parts_of(cache: Caches) -> Sequence[tq.Cache]:
    """The caches that a cache has."""
    return (cache,) if isinstance(cache, tq.Cache) else cache.caches


def counts_after(hidden: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Numbers of tokens for an append that follows the last reading of the cache.

    That it follows has to be seen in its arguments, or XLA may keep a copy of the cache for the reader.

    Args:
        hidden: [b, t, dim], made from everything that was read.
        lengths: int32 [b], valid tokens of the chunk per sequence; None means all t.

    Returns:
        The lengths, int32 [b]: the sum below is never less than they are.
    """
    count = jnp.full(hidden.shape[:1], hidden.shape[1], jnp.int32) if lengths is None else lengths
    return jnp.minimum(count, count + jnp.isnan(hidden[:, 0, 0]).astype(jnp.int32))
