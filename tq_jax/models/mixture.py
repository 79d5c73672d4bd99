"""Feed-forward blocks of many experts, of which each token takes a few (arXiv:1701.06538)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels.pytree import pytree
from tq_jax.models.blocks import AttentionParts, Block, Gate, Qwen3Block, linear
from tq_jax.models.config import DecoderConfig

TILE = 256
"""Most rows of one expert that are multiplied at once."""

LIMIT, SLOPE = 7.0, 1.702
"""Bound of gate and up, and slope of the sigmoid, of `clamped_swiglu`."""


@pytree
class Tiles:
    """Rows sorted by their experts and cut into tiles of one expert each.

    Attributes:
        experts: int32 [tiles], the expert of each tile.
        rows: int32 [tiles, size], the row at each place of a tile; n, which is no row, at places without one.
        places: int32 [n], the place of each row, counted over all tiles.
    """

    experts: jax.Array
    rows: jax.Array
    places: jax.Array


def tiles_of(experts: jax.Array, *, count: int) -> Tiles:
    """Rows in tiles.

    Args:
        experts: int32 [n], the expert of each row.
        count: Number of experts.

    Returns:
        As many tiles as rows ever need: the last ones may be empty.

    Example:
        >>> tiles = tiles_of(jnp.array([1, 0, 1], jnp.int32), count=2)
        >>> tiles.experts.tolist(), tiles.rows[:, 0].tolist(), tiles.places.tolist()
        ([0, 1, 1], [1, 0, 2], [1, 0, 2])
    """
    n = experts.shape[0]
    size = min(TILE, 1 << max((n // count).bit_length() - 1, 0))
    tiles = min(n, n // size + count)
    sizes = jnp.zeros(count, jnp.int32).at[experts].add(1)
    ends = jnp.cumsum(-(-sizes // size))  # in tiles
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    sorted_experts = experts[order]
    within = jnp.arange(n, dtype=jnp.int32) - (jnp.cumsum(sizes) - sizes)[sorted_experts]
    sorted_places = (ends - -(-sizes // size))[sorted_experts] * size + within
    rows = jnp.full(tiles * size, n, jnp.int32).at[sorted_places].set(order)
    owners = jnp.searchsorted(ends, jnp.arange(tiles, dtype=jnp.int32), side="right")
    places = jnp.zeros(n, jnp.int32).at[order].set(sorted_places)
    return Tiles(jnp.minimum(owners, count - 1).astype(jnp.int32), rows.reshape(tiles, size), places)


class ExpertLinear(nnx.Module):
    """The projections of all experts; the kernel is [experts, *outputs, inputs].

    Args:
        count: Number of experts.
        inputs: Channels of the input.
        outputs: Axes of the output.
        bias: Whether a bias is added.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters, of variance 1 / inputs.
    """

    def __init__(
        self, count: int, inputs: int, outputs: tuple[int, ...], *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        shape = (count, *outputs, inputs)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(inputs**-0.5, dtype))
        self.bias = nnx.Param(jnp.zeros((count, *outputs), dtype)) if bias else nnx.data(None)

    def __call__(self, rows: jax.Array, expert: jax.Array) -> jax.Array:
        """The outputs [n, *outputs] of one expert, int32 [], for rows [n, inputs]."""
        return self._biased(jnp.einsum("ni,...i->n...", rows, self.kernel[...][expert]), expert[None])

    def of_each(self, rows: jax.Array, experts: jax.Array) -> jax.Array:
        """The outputs [n, *outputs] of an expert per row, int32 [n]; kernels are read where they lie, once per row."""
        kernels = self.kernel[...][experts].astype(jnp.float32)
        spread = rows.astype(jnp.float32).reshape(rows.shape[0], *[1] * (kernels.ndim - 2), rows.shape[1])
        return self._biased(jnp.sum(kernels * spread, axis=-1).astype(rows.dtype), experts)

    def _biased(self, found: jax.Array, experts: jax.Array) -> jax.Array:
        return found if self.bias is None else found + self.bias[...][experts]


class Mixture(nnx.Module):
    """A feed-forward block of experts: a token's output is the weighted sum of those of its best experts.

    Args:
        config: Sizes of the decoder.
        gate: Joins gate and up.
        bias: Whether router and experts have biases.
        dtype: Type of parameters and activations.
        rngs: Source of random initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, gate: Gate, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        count, how = config.num_experts, {"bias": bias, "dtype": dtype, "rngs": rngs}
        self.router = linear(config.dim, (count,), bias=bias, dtype=dtype, rngs=rngs)
        self.gate_up = ExpertLinear(count, config.dim, (2, config.ffn_dim), **how)
        self.down = ExpertLinear(count, config.ffn_dim, (config.dim,), **how)
        self.gate, self.taken, self.normalized = gate, config.experts_per_token, config.normalized_experts

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Feed-forward of hidden states [b, t, dim]."""
        weights, experts = self.route(hidden)
        tokens, experts = hidden.reshape(-1, hidden.shape[2]), experts.reshape(-1)
        taken, count = weights.shape[-1], self.gate_up.kernel.shape[0]
        if experts.shape[0] <= count:
            # So few rows leave most experts alone, whose kernels are then not read at all.
            out = self._expert(self.gate_up.of_each, self.down.of_each, jnp.repeat(tokens, taken, axis=0), experts)
        else:
            out = self._by_tiles(tokens, tiles_of(experts, count=count), taken=taken)
        out = out.reshape(*weights.shape, -1).astype(jnp.float32)
        return jnp.einsum("btk,btkc->btc", weights, out, precision="highest").astype(hidden.dtype)

    def route(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights, float32 [b, t, k], and numbers, int32 [b, t, k], of the experts of each token."""
        logits = self.router(hidden).astype(jnp.float32)
        found, experts = lax.top_k(logits, self.taken)
        total = jax.nn.logsumexp(found if self.normalized else logits, axis=-1, keepdims=True)
        return jnp.exp(found - total), experts

    def _by_tiles(self, tokens: jax.Array, tiles: Tiles, *, taken: int) -> jax.Array:
        """The output of every row of the tiles, [rows, dim]; row r belongs to token r // taken."""

        def tile(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            expert, rows = inputs
            # A place without a row reads the last token; nobody reads its output.
            return self._expert(self.gate_up, self.down, tokens[jnp.minimum(rows // taken, len(tokens) - 1)], expert)

        return lax.map(tile, (tiles.experts, tiles.rows)).reshape(-1, tokens.shape[1])[tiles.places]

    def _expert(
        self, gate_up: Callable[..., jax.Array], down: Callable[..., jax.Array], rows: jax.Array, experts: jax.Array
    ) -> jax.Array:
        both = gate_up(rows, experts)  # [n, 2, ffn_dim]
        return down(self.gate(both[:, 0], both[:, 1]), experts)


class BiasedMixture(Mixture):
    """A `Mixture` whose router and experts have biases."""

    def __init__(self, config: DecoderConfig, *, gate: Gate, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, gate=gate, bias=True, dtype=dtype, rngs=rngs)


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Gate and up of gpt-oss, bounded before they are joined (arXiv:2508.10925)."""
    gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
    return gate * jax.nn.sigmoid(SLOPE * gate) * (up + 1)


class MixtralBlock(Block):
    """Layer of Mixtral: a mixture of experts."""

    feed_forward = Mixture


class Qwen3MoeBlock(Qwen3Block):
    """Layer of Qwen 3 MoE: that of Qwen 3 with a mixture of experts."""

    feed_forward = Mixture


class GptOssBlock(Block):
    """Layer of gpt-oss: sink logits, biases everywhere, and a mixture of experts."""

    parts: ClassVar[AttentionParts] = AttentionParts(bias=True, output_bias=True, sinks=True)
    feed_forward = BiasedMixture
    gate = staticmethod(clamped_swiglu)
