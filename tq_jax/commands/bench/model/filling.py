"""Caches full of random tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import tq_jax as tq
from tq_jax.models import Decoder
from tq_jax.models.layer_caches import Caches, map_caches
from tq_jax.models.share import StripedShare
from tq_jax.shares import append_share


@functools.partial(jax.jit, static_argnames="chunk", donate_argnames="cache")
def append_random(
    decoder: Decoder, cache: Caches, key: jax.Array, start: jax.Array, count: jax.Array, *, chunk: int
) -> tuple[Caches]:
    """Appends random tokens to every row; a step for `tq_jax.models.mesh_step.run_step`.

    Args:
        decoder: The decoder, or a device's share of it.
        cache: The cache; donated.
        key: Random key.
        start: Tokens of each sequence so far.
        count: Tokens to append, at most `chunk`.
        chunk: Tokens of the arrays.

    Returns:
        The cache alone.
    """

    def append(cache: tq.Cache) -> tq.Cache:
        shape = (cache.rows, chunk, cache.spec.num_kv_heads, cache.spec.head_dim)
        k, v = (jax.random.normal(part, shape, jnp.bfloat16) for part in jax.random.split(key))
        given: dict[str, Any] = {"lengths": jnp.broadcast_to(count, (cache.rows,))}
        if isinstance(decoder, StripedShare):
            start_of_rows = jnp.broadcast_to(start, (cache.rows,))
            return append_share(cache, k, v, axis=decoder.sequence_axis, start=start_of_rows, **given)
        return tq.append(cache, k, v, **given)

    return (map_caches(append, cache),)
