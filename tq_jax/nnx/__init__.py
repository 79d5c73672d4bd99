"""Attention of Flax NNX whose decode cache is compressed."""

from tq_jax.nnx.attention import CompressedAttention, RotaryAttention

__all__ = ["CompressedAttention", "RotaryAttention"]
