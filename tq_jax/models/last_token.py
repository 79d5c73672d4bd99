"""The last token of each sequence of a padded batch: of a prompt nothing else is wanted of the last layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def last_places(tokens: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """The place of the last valid token of each sequence, int32 [b]; 0 where there is none."""
    batch, count = tokens.shape
    return jnp.full(batch, count - 1, jnp.int32) if lengths is None else jnp.maximum(lengths - 1, 0)


def token_of(x: jax.Array, only: jax.Array | None) -> jax.Array:
    """One token of every sequence.

    Args:
        x: [b, t, ...].
        only: int32 [b], the place of the token in each sequence; None for all tokens.

    Returns:
        [b, 1, ...], or all of x.
    """
    if only is None:
        return x
    return jnp.take_along_axis(x, only.reshape(-1, *[1] * (x.ndim - 1)), axis=1)
