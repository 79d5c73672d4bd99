"""Caches full of random tokens."""

import functools

import jax
import jax.numpy as jnp

import tq_jax as tq
from tq_jax.models.layer_caches import Caches, map_caches


@functools.partial(jax.jit, static_argnames="chunk", donate_argnames="cache")
def append_random(cache: Caches, key: jax.Array, count: jax.Array, *, chunk: int) -> Caches:
    """Appends random tokens to every row; the cache is donated.

    Args:
        cache: The cache.
        key: Random key.
        count: Tokens to append, at most `chunk`.
        chunk: Tokens of the arrays.
    """

    def append(cache: tq.Cache) -> tq.Cache:
        shape = (cache.rows, chunk, cache.spec.num_kv_heads, cache.spec.head_dim)
        k, v = (jax.random.normal(part, shape, jnp.bfloat16) for part in jax.random.split(key))
        return tq.append(cache, k, v, lengths=jnp.broadcast_to(count, (cache.rows,)))

    return map_caches(append, cache)
