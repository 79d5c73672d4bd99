"""The cache of one layer as Tunix carries it, and attention over it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import tq_jax as tq
from pallas_kernels.pytree import pytree
from tq_jax.quantizer import is_traced

BY_ROWS = ("exact_keys", "exact_values", "length", "compressed", "overflow", "statistics")
"""Fields of a `tq_jax.Cache` whose arrays have a row per sequence; pages have several."""


@pytree
class LayerCache:
    """A `tq_jax.Cache` in which sequences are the first axis of every array; a pytree.

    Beam search repeats and picks sequences along the first axis of every array of a cache. Pages are therefore held as
    [sequences, pages, ...], and quantizers, which all sequences share, are made from their seed when needed.

    Attributes:
        arrays: Arrays of the `tq_jax.Cache`, by field.
        end_index: int32 [b], tokens seen, padding included: the column of the next token in Tunix's masks.
        spec: Spec of the cache (static).
        seed: Seed of the quantizers (static).

    Example:
        >>> spec = tq.CacheSpec.recommended(num_kv_heads=2, head_dim=64, max_tokens=512)
        >>> cache = LayerCache.empty(spec, batch=3)
        >>> {x.shape[0] for x in jax.tree.leaves(cache)}, cache.to_cache().rows
        ({3}, 3)
    """

    arrays: dict[str, Any]
    end_index: jax.Array
    spec: tq.CacheSpec = dataclasses.field(metadata={"static": True})
    seed: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, spec: tq.CacheSpec, *, batch: int, seed: int = 0) -> "LayerCache":
        """An empty cache.

        Args:
            spec: What it holds.
            batch: Sequences.
            seed: Seed of the quantizers, see `tq_jax.init_cache`.

        Raises:
            ValueError: For a negative batch.
        """
        return cls.of(tq.init_cache(spec, batch=batch, seed=seed), jnp.zeros(batch, jnp.int32), seed=seed)

    @classmethod
    def of(cls, cache: tq.Cache, end_index: jax.Array, *, seed: int) -> "LayerCache":
        """The arrays of a cache with quantizers of a seed; inverse of `to_cache`."""
        spec, rows = cache.spec, cache.rows
        pages = jax.tree.map(lambda x: x.reshape(rows, spec.pages_per_row, *x.shape[1:]), cache.pages)
        return cls({"pages": pages, **{name: getattr(cache, name) for name in BY_ROWS}}, end_index, spec, seed)

    def to_cache(self) -> tq.Cache:
        """The cache as `tq_jax.append` and `tq_jax.attend` take it; nothing is copied under jit."""
        pages = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self.arrays["pages"])
        quantizers = [
            None if spec is None else tq.make_quantizer(spec, seed=self.seed + i)
            for i, spec in enumerate((self.spec.key, self.spec.value))
        ]
        arrays = self.arrays | {"pages": pages}
        return tq.Cache(**arrays, key_quantizer=quantizers[0], value_quantizer=quantizers[1], spec=self.spec)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))


def extend(
    cache: LayerCache, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, **options: Any
) -> tuple[LayerCache, jax.Array]:
    """Appends the tokens of a chunk that Tunix's mask shows, and attends to the cache.

    Args:
        cache: The cache of the layer.
        query: Queries after rotary embedding, [b, t, h_q, d].
        key: Keys after rotary embedding, [b, t, h_kv, d].
        value: Values, [b, t, h_kv, d].
        mask: bool [b, t, columns], which tokens each query sees. A token that does not see itself is padding: it is not
            stored. Every other token must see all tokens before it that are no padding.
        **options: sliding_window, softcap and scale of `tq_jax.attend`.

    Returns:
        The new cache, and outputs [b, t, h_q, d]. Under jit, outputs of sequences whose mask is not causal are NaN.

    Raises:
        NotImplementedError: Outside jit, for a mask that is not causal.
    """
    tokens = query.shape[1]
    columns = cache.end_index[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    visible = jnp.take_along_axis(mask, columns[:, :, None], axis=2, mode="fill", fill_value=False)[:, :, 0]
    before = cache.arrays["length"]
    expected = before[:, None] + jnp.cumsum(visible, axis=1, dtype=jnp.int32)
    ahead = jnp.arange(mask.shape[2], dtype=jnp.int32)[None, None] > columns[:, :, None]
    causal = (jnp.sum(mask, axis=2, dtype=jnp.int32) == expected) & ~jnp.any(mask & ahead, axis=2)
    causal = jnp.all(causal | ~visible, axis=1)
    if not is_traced(causal) and not bool(jnp.all(causal)):
        raise NotImplementedError(
            f"a compressed cache is read by causal masks that hide padding only, got another for sequences "
            f"{jnp.flatnonzero(~causal).tolist()}"
        )
    count = jnp.sum(visible, axis=1, dtype=jnp.int32)
    if tokens == 1:
        # A hidden token is not stored, but its query still sees what is stored.
        stored = tq.append(cache.to_cache(), key, value, query=query, lengths=count)
        out = tq.attend(query, stored, **options)
    else:
        # Left padding becomes right padding: tokens that exist come first, in order.
        order = jnp.argsort(~visible, axis=1, stable=True)
        query, key, value = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (query, key, value))
        stored = tq.append(cache.to_cache(), key, value, query=query, lengths=count)
        out = tq.attend(query, stored, lengths=count, **options)
        out = jnp.take_along_axis(out, jnp.argsort(order, axis=1)[:, :, None, None], axis=1)
    out = jnp.where(causal[:, None, None, None], out, jnp.asarray(jnp.nan, out.dtype))
    return LayerCache.of(stored, cache.end_index + jnp.int32(tokens), seed=cache.seed), out
