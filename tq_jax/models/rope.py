"""Rotary position embedding, half-split: channel i turns with channel i + head_dim / 2 (arXiv:2104.09864)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.layer.heads import Turn


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the one that the model was first trained on.

    Attributes:
        kind: "linear" divides every frequency by `factor`. "llama3" keeps frequencies that turn often within the
            original context, divides frequencies that turn seldom, and blends in between.
        factor: The divisor; at least 1.
        low_freq_factor: For "llama3": frequencies of fewer turns within the original context are divided.
        high_freq_factor: For "llama3": frequencies of more turns within the original context are kept.
        original_context: For "llama3": tokens of the original context.

    Raises:
        ValueError: If the numbers contradict each other.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling: expected 'linear' or 'llama3', got {self.kind!r}")
        if not self.factor >= 1:
            raise ValueError(f"rope scaling: expected a factor of at least 1, got {self.factor!r}")
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.original_context < 1:
            raise ValueError(
                "rope scaling: expected 0 < low_freq_factor < high_freq_factor and a positive original_context, got "
                f"{self.low_freq_factor}, {self.high_freq_factor} and {self.original_context}"
            )


def rotary_frequencies(*, head_dim: int, base: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Angles by which each channel pair turns from one token to the next.

    Args:
        head_dim: Channels of one head; even.
        base: Base of the geometric progression of frequencies.
        scaling: How the frequencies are stretched; None if they are not.

    Returns:
        float32 [head_dim / 2], radians per token.

    Example:
        >>> rotary_frequencies(head_dim=4, base=100.0, scaling=RopeScaling(kind="linear", factor=2.0)).tolist()
        [0.5, 0.05000000074505806]
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / jnp.float32(head_dim)
    frequency = jnp.float32(1.0) / jnp.float32(base) ** exponent
    if scaling is None:
        return frequency
    slow = frequency / jnp.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    turns = frequency * jnp.float32(scaling.original_context / (2 * math.pi))
    width = scaling.high_freq_factor - scaling.low_freq_factor
    share = jnp.clip((turns - jnp.float32(scaling.low_freq_factor)) / jnp.float32(width), 0.0, 1.0)
    return (1.0 - share) * slow + share * frequency


def rotary_turn(positions: jax.Array, *, head_dim: int, base: float, scaling: RopeScaling | None = None) -> Turn:
    """How each channel pair of each token is turned.

    Args:
        positions: int32 [b, t], the position of each token in its sequence.
        head_dim: Channels of one head; even.
        base: Base of the geometric progression of frequencies.
        scaling: How the frequencies are stretched; None if they are not.

    Returns:
        Cosine and sine of the angles.

    Example:
        >>> cos, sin = rotary_turn(jnp.array([[0, 3]]), head_dim=4, base=100.0)
        >>> bool(jnp.allclose(jnp.arctan2(sin, cos)[0, 1], jnp.array([3.0, 0.3])))
        True
    """
    frequency = rotary_frequencies(head_dim=head_dim, base=base, scaling=scaling)
    angles = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)
