"""The layers of the decoder families in Flax NNX: norms, attention with rotary positions, gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.layer import JointHeads, NormWeights, residual_norm
from tq_jax.models.config import DecoderConfig
from tq_jax.models.last_token import token_of
from tq_jax.models.rope import Turn

# (heads, not split yet; sink_logits: [h_q], if the layer has them) -> (mixed values [b, t or 1, h_q, d], the cache
# afterwards)
Mix = Callable[..., tuple[jax.Array, Any]]
Gate = Callable[[jax.Array, jax.Array], jax.Array]
"""Joins gate and up of a feed-forward block."""


class RMSNorm(nnx.Module):
    """Root-mean-square norm of the last axis, after a residual sum; see `pallas_kernels.layer.norm`.

    Args:
        width: Channels of the last axis.
        epsilon: Added to the mean square.
        dtype: Type of the weights.

    Attributes:
        centered: Whether weights are stored as their distance from one.
    """

    centered: ClassVar[bool] = False

    def __init__(self, width: int, *, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param((jnp.zeros if self.centered else jnp.ones)((width,), dtype))
        self.epsilon = epsilon

    @property
    def weights(self) -> NormWeights:
        """The weights as kernels take them."""
        return NormWeights(self.scale[...], self.epsilon, self.centered)

    def __call__(self, hidden: jax.Array, added: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The sum [..., width] of hidden states and what is added to them, and its norm."""
        return residual_norm(hidden, added, self.weights)


class CenteredRMSNorm(RMSNorm):
    """`RMSNorm` with weights stored as their distance from one, applied before rounding to the activations' dtype."""

    centered = True


@dataclass(frozen=True)
class AttentionParts:
    """The parts that attention has in some families only.

    Attributes:
        bias: Whether the projections to queries, keys and values have biases.
        output_bias: Whether the projection of the outputs has a bias.
        head_norm: Norm of each query head and key head before rotary embedding; None for no norm.
        joint_norm: Whether the channels of all query heads have one norm, and those of all key heads another.
        sinks: Whether each query head has a learned logit without a value.
    """

    bias: bool = False
    output_bias: bool = False
    head_norm: type[RMSNorm] | None = None
    joint_norm: bool = False
    sinks: bool = False


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; the caller's `Mix` decides how tokens mix.

    One product makes queries, keys and values. Its kernel is [h_kv, g + 2, d, dim]: each KV head has its g query heads,
    its key head and its value head side by side, so that whole KV heads can be shared out over devices.

    Args:
        config: Sizes of the decoder.
        parts: The parts that only some families have.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, parts: AttentionParts, dtype: jnp.dtype, rngs: nnx.Rngs):
        group = config.num_heads // config.num_kv_heads
        heads, channels = (config.num_kv_heads, group + 2, config.head_dim), config.num_heads * config.head_dim
        self.qkv = linear(config.dim, heads, bias=parts.bias, dtype=dtype, rngs=rngs)
        self.output = linear(channels, (config.dim,), bias=parts.output_bias, dtype=dtype, rngs=rngs)
        self.query_norm, self.key_norm, self.sinks = nnx.data(None), nnx.data(None), nnx.data(None)
        self.joint_norm = parts.joint_norm
        norm, widths = parts.head_norm, (config.head_dim, config.head_dim)
        if parts.joint_norm:
            norm, widths = RMSNorm, (channels, config.num_kv_heads * config.head_dim)
        if norm is not None:
            self.query_norm = norm(widths[0], epsilon=config.norm_eps, dtype=dtype)
            self.key_norm = norm(widths[1], epsilon=config.norm_eps, dtype=dtype)
        if parts.sinks:
            self.sinks = nnx.Param(jnp.zeros(config.num_heads, dtype))

    def __call__(self, hidden: jax.Array, turn: Turn, mix: Mix) -> tuple[jax.Array, Any]:
        """Attention over hidden states.

        Args:
            hidden: [b, t, dim], after the norm of the layer.
            turn: Rotary positions of the tokens.
            mix: Mixes the values.

        Returns:
            [b, t or 1, dim], for as many tokens as `mix` returns, and the cache afterwards.
        """
        norms: dict[str, Any] = {}
        product = self.qkv(hidden)
        if self.query_norm is not None and self.key_norm is not None:
            if self.joint_norm:
                product = _normed_together(product, self.query_norm, self.key_norm)
            else:
                norms = {"query_norm": self.query_norm.weights, "key_norm": self.key_norm.weights}
        own = {} if self.sinks is None else {"sink_logits": self.sinks[...]}
        mixed, cache = mix(JointHeads(product, turn, **norms), **own)
        return self.output(mixed.reshape(*mixed.shape[:2], -1)), cache


def _normed_together(product: jax.Array, query_norm: RMSNorm, key_norm: RMSNorm) -> jax.Array:
    """A joint product [b, t, h_kv, g + 2, d] with a norm of all query heads together, and one of all key heads."""
    parts = [product[:, :, :, :-2], product[:, :, :, -2:-1]]
    for place, norm in enumerate((query_norm, key_norm)):
        parts[place] = norm(parts[place].reshape(*product.shape[:2], -1))[1].reshape(parts[place].shape)
    return jnp.concatenate([*parts, product[:, :, :, -1:]], axis=3)


class GatedMLP(nnx.Module):
    """Gated feed-forward block, down(activation(gate) * up) (arXiv:2002.05202); one product makes gate and up.

    Args:
        config: Sizes of the decoder.
        gate: Joins gate and up.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, gate: Gate, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_up = linear(config.dim, (2, config.ffn_dim), dtype=dtype, rngs=rngs)
        self.down = linear(config.ffn_dim, (config.dim,), dtype=dtype, rngs=rngs)
        self.gate = gate

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Feed-forward of hidden states [b, t, dim]."""
        both = self.gate_up(hidden)  # [b, t, 2, ffn_dim]
        return self.down(self.gate(both[:, :, 0], both[:, :, 1]))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Gate and up joined by SiLU."""
    return jax.nn.silu(gate) * up


def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Gate and up joined by GELU in its tanh approximation, which is JAX's default."""
    return jax.nn.gelu(gate) * up


class Block(nnx.Module):
    """One pre-norm layer of Llama and Mistral. Families with other parts are subclasses.

    Args:
        config: Sizes of the decoder.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters.

    Attributes:
        parts: Parts of attention.
        norm: Norm of hidden states.
        pre_norms: Whether the inputs of attention and feed-forward have norms.
        post_norms: Whether their outputs have norms.
        feed_forward: The feed-forward block.
        gate: Joins gate and up in it.
    """

    parts: ClassVar[AttentionParts] = AttentionParts()
    norm: ClassVar[type[RMSNorm]] = RMSNorm
    pre_norms: ClassVar[bool] = True
    post_norms: ClassVar[bool] = False
    feed_forward: ClassVar[type[nnx.Module]] = GatedMLP
    gate: ClassVar[Gate] = staticmethod(swiglu)

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def norm(exists: bool) -> Any:
            return self.norm(config.dim, epsilon=config.norm_eps, dtype=dtype) if exists else nnx.data(None)

        self.attention_norm, self.mlp_norm = norm(self.pre_norms), norm(self.pre_norms)
        self.attention_post_norm, self.mlp_post_norm = norm(self.post_norms), norm(self.post_norms)
        self.attention = Attention(config, parts=self.parts, dtype=dtype, rngs=rngs)
        feed_forward: Any = self.feed_forward
        self.mlp = feed_forward(config, gate=self.gate, dtype=dtype, rngs=rngs)

    def __call__(
        self, hidden: jax.Array, added: jax.Array, turn: Turn, mix: Mix, *, only: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Apply the layer.

        The last sum of a layer is left to the next one, whose first norm computes it on the way.

        Args:
            hidden: [b, t, dim], hidden states.
            added: [b, t, dim], to be added to them.
            turn: Rotary positions of the tokens.
            mix: Mixes the values in attention.
            only: int32 [b], the token of each sequence for which `mix` returns values and the layer goes on after
                attention; None for all tokens.

        Returns:
            Hidden states and what is to be added to them, [b, t or 1, dim] each, and the cache afterwards.
        """
        hidden, normed = _before(self.attention_norm, hidden, added)
        mixed, cache = self.attention(normed, turn, mix)
        hidden, normed = _before(self.mlp_norm, token_of(hidden, only), _after(self.attention_post_norm, mixed))
        return hidden, _after(self.mlp_post_norm, self.mlp(normed)), cache


def _before(norm: RMSNorm | None, hidden: jax.Array, added: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states with what is added to them, and the input of the next part, which may have a norm."""
    if norm is not None:
        return norm(hidden, added)
    return hidden + added, hidden + added


def _after(norm: RMSNorm | None, output: jax.Array) -> jax.Array:
    """The output of a part, which may have a norm."""
    return output if norm is None else norm(output)[1]


class Qwen2Block(Block):
    """Layer of Qwen 2: biases of queries, keys and values."""

    parts = AttentionParts(bias=True)


class Qwen3Block(Block):
    """Layer of Qwen 3: norms of query heads and key heads."""

    parts = AttentionParts(head_norm=RMSNorm)


class Gemma2Block(Block):
    """Layer of Gemma 2: norms of the outputs of attention and feed-forward too."""

    norm = CenteredRMSNorm
    post_norms = True
    gate = staticmethod(geglu)


class Gemma3Block(Gemma2Block):
    """Layer of Gemma 3: that of Gemma 2 with norms of query heads and key heads."""

    parts = AttentionParts(head_norm=CenteredRMSNorm)


class Olmo2Block(Block):
    """Layer of OLMo 2: norms of the outputs of attention and feed-forward only, and of all query or key heads."""

    parts = AttentionParts(joint_norm=True)
    pre_norms = False
    post_norms = True


def linear(
    inputs: int, outputs: tuple[int, ...], *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Einsum:
    """A projection whose kernel is [*outputs, inputs], as in checkpoints, so that loading transposes nothing.

    Args:
        inputs: Channels of the input.
        outputs: Axes of the output.
        bias: Whether a bias is added.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters, of variance 1 / inputs.

    Returns:
        A module from [b, t, inputs] to [b, t, *outputs].
    """
    axes = "opq"[: len(outputs)]
    return nnx.Einsum(
        f"bti,{axes}i->bt{axes}",
        (*outputs, inputs),
        outputs if bias else None,
        kernel_init=nnx.initializers.lecun_normal(-1, -2, tuple(range(len(outputs) - 1))),
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )
