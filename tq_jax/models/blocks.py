"""The layers of the decoder families in Flax NNX: norms, attention with rotary positions, gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.layer import JointHeads, NormWeights, residual_norm
from tq_jax.models.config import DecoderConfig
from tq_jax.models.last_token import token_of
from tq_jax.models.rope import Turn

# heads, not split yet -> (mixed values [b, t or 1, h_q, d], the cache afterwards)
Mix = Callable[[JointHeads], tuple[jax.Array, Any]]


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


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; the caller's `Mix` decides how tokens mix.

    One product makes queries, keys and values. Its kernel is [h_kv, g + 2, d, dim]: each KV head has its g query heads,
    its key head and its value head side by side, so that whole KV heads can be shared out over devices.

    Args:
        config: Sizes of the decoder.
        bias: Whether the projections to queries, keys and values have biases.
        head_norm: Norm of each query head and key head before rotary embedding; None for no norm.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        bias: bool,
        head_norm: type[RMSNorm] | None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        group = config.num_heads // config.num_kv_heads
        heads = (config.num_kv_heads, group + 2, config.head_dim)
        self.qkv = linear(config.dim, heads, bias=bias, dtype=dtype, rngs=rngs)
        self.output = linear(config.num_heads * config.head_dim, (config.dim,), dtype=dtype, rngs=rngs)
        self.query_norm, self.key_norm = nnx.data(None), nnx.data(None)
        if head_norm is not None:
            self.query_norm = head_norm(config.head_dim, epsilon=config.norm_eps, dtype=dtype)
            self.key_norm = head_norm(config.head_dim, epsilon=config.norm_eps, dtype=dtype)

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
        if self.query_norm is not None and self.key_norm is not None:
            norms = {"query_norm": self.query_norm.weights, "key_norm": self.key_norm.weights}
        mixed, cache = mix(JointHeads(self.qkv(hidden), turn, **norms))
        return self.output(mixed.reshape(*mixed.shape[:2], -1)), cache


class GatedMLP(nnx.Module):
    """Gated feed-forward block, down(activation(gate) * up) (arXiv:2002.05202); one product makes gate and up.

    Args:
        config: Sizes of the decoder.
        activation: Activation of the gate.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        activation: Callable[..., jax.Array],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.gate_up = linear(config.dim, (2, config.ffn_dim), dtype=dtype, rngs=rngs)
        self.down = linear(config.ffn_dim, (config.dim,), dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Feed-forward of hidden states [b, t, dim]."""
        both = self.gate_up(hidden)  # [b, t, 2, ffn_dim]
        return self.down(self.activation(both[:, :, 0]) * both[:, :, 1])


class Block(nnx.Module):
    """One pre-norm layer of Llama and Mistral. Families with other parts are subclasses.

    Args:
        config: Sizes of the decoder.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters.

    Attributes:
        bias: Whether the projections to queries, keys and values have biases.
        head_norm: Norm of query heads and key heads; None for no norm.
        norm: Norm of hidden states.
        activation: Activation of the feed-forward block.
    """

    bias: ClassVar[bool] = False
    head_norm: ClassVar[type[RMSNorm] | None] = None
    norm: ClassVar[type[RMSNorm]] = RMSNorm
    activation: ClassVar[Callable[..., jax.Array]] = staticmethod(jax.nn.silu)

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = self.norm(config.dim, epsilon=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, bias=self.bias, head_norm=self.head_norm, dtype=dtype, rngs=rngs)
        self.mlp_norm = self.norm(config.dim, epsilon=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, activation=self.activation, dtype=dtype, rngs=rngs)

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
        hidden, normed = self.attention_norm(hidden, added)
        mixed, cache = self.attention(normed, turn, mix)
        hidden, normed = self.mlp_norm(token_of(hidden, only), mixed)
        return hidden, self.mlp(normed), cache


class Qwen2Block(Block):
    """Layer of Qwen 2: biases of queries, keys and values."""

    bias = True


class Qwen3Block(Block):
    """Layer of Qwen 3: norms of query heads and key heads."""

    head_norm = RMSNorm


class Gemma3Block(Block):
    """Layer of Gemma 3: norms of query heads and key heads, and of the outputs of attention and feed-forward."""

    head_norm = CenteredRMSNorm
    norm = CenteredRMSNorm
    activation = staticmethod(jax.nn.gelu)  # the tanh approximation, its default

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.attention_post_norm = self.norm(config.dim, epsilon=config.norm_eps, dtype=dtype)
        self.mlp_post_norm = self.norm(config.dim, epsilon=config.norm_eps, dtype=dtype)

    def __call__(
        self, hidden: jax.Array, added: jax.Array, turn: Turn, mix: Mix, *, only: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Apply the layer, with the arguments and results of `Block`."""
        hidden, normed = self.attention_norm(hidden, added)
        mixed, cache = self.attention(normed, turn, mix)
        hidden, normed = self.mlp_norm(token_of(hidden, only), self.attention_post_norm(mixed)[1])
        return hidden, self.mlp_post_norm(self.mlp(normed))[1], cache


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
