"""Rotary position embedding, half-split: channel i turns with channel i + head_dim / 2 (arXiv:2104.09864)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_angles(positions: jax.Array, *, head_dim: int, base: float) -> jax.Array:
    """Angles in radians by which each channel pair turns.

    Args:
        positions: int32 [b, t], the index of each token in its sequence.
        head_dim: channels of one head; even.
        base: base of the geometric progression of frequencies.

    Returns:
        float32 [b, t, head_dim / 2].

    Example:
        >>> rotary_angles(jnp.array([[0, 3]]), head_dim=4, base=100.0)[0, 1].tolist()
        [3.0, 0.30000001192092896]
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / jnp.float32(head_dim)
    frequency = jnp.float32(1.0) / jnp.float32(base) ** exponent
    return positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn every head of ``x`` by its token's angles.

    Args:
        x: [b, t, heads, head_dim].
        angles: float32 [b, t, head_dim / 2], from `rotary_angles`.

    Returns:
        [b, t, heads, head_dim] in the dtype of ``x``; computed in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
