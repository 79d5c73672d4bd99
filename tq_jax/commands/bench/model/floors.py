"""What a decoding step must read and a prompt must compute: the floors of their times."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from tq_jax.commands.bench.model.placement import device_bytes
from tq_jax.models import Decoder, DecoderConfig


def all_weights(decoder: Decoder) -> int:
    """Bytes of all parameters on one device.

    Args:
        decoder: The decoder.
    """
    return device_bytes(decoder)


def weight_dtype(decoder: Decoder) -> jnp.dtype:
    """Type of the largest parameter.

    Args:
        decoder: The decoder.
    """
    return max(jax.tree.leaves(decoder), key=lambda leaf: leaf.size).dtype


def read_weights(decoder: Decoder) -> int:
    """Bytes of the parameters that a decoding step reads on one device: all but an embedding that is not also the head.

    From such an embedding a step gathers one vector per sequence, which does not count. Of a mixture of experts at
    least those of one token are read, which is all if the tokens of a batch agree.

    Args:
        decoder: The decoder.
    """
    config, unread = decoder.config, 0 if decoder.config.tied_head else device_bytes(decoder.embedding)
    if config.num_experts:
        mixtures: list[Any] = [getattr(block, "mlp") for block in decoder.blocks]  # noqa: B009
        experts = sum(device_bytes(part) for mlp in mixtures for part in (mlp.gate_up, mlp.down))
        unread += experts * (config.num_experts - config.experts_per_token) // config.num_experts
    return all_weights(decoder) - unread


def layer_weights(config: DecoderConfig) -> int:
    """Numbers in the matrices of all layers that multiply a token: of a mixture, its router and the token's experts.

    Args:
        config: Sizes of the decoder.
    """
    projections = 2 * config.dim * (config.num_heads + config.num_kv_heads) * config.head_dim
    feed_forward = 3 * config.dim * config.ffn_dim
    if config.num_experts:
        feed_forward = feed_forward * config.experts_per_token + config.dim * config.num_experts
    return config.num_layers * (projections + feed_forward)


def prompt_operations(config: DecoderConfig, tokens: int, batch: int) -> int:
    """Multiplications and additions of a prompt.

    Counted are the matrices of all layers for every token, both products of causal attention for every pair of a query
    and a key that it sees, and the head for the last token.

    Args:
        config: Sizes of the decoder.
        tokens: Tokens per sequence.
        batch: Number of sequences.
    """
    pairs = 0
    for window in config.layer_windows:
        width = tokens if window is None else min(window, tokens)
        pairs += math.comb(width + 1, 2) + (tokens - width) * width
    attention = 4 * pairs * config.num_heads * config.head_dim
    return batch * (2 * layer_weights(config) * tokens + attention + 2 * config.vocab_size * config.dim)
