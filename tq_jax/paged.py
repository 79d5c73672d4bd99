"""Attention over packed pages that a block table puts together, as serving engines keep them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import LogitOptions, PagedArguments, Partial, decode_attention, merge
from pallas_kernels.blocks import Blocks
from pallas_kernels.pages import Pages
from tq_jax.quantizer import Quantizer, from_rotated, sketch_gain, sketch_query, to_rotated

Statistics = tuple[Float[Array, "b h_kv d"], Float[Array, "b h_kv d"]]
"""Mean and channel weights of the keys of each sequence, see `tq_jax.statistics`."""


class PackedTokens(NamedTuple):
    """The packed tokens of some sequences.

    Attributes:
        pages: The pools, or the blocks that hold the pages.
        quantizers: Quantizers of keys and of values.
        table: int32 [b, n], page of each run of page_size tokens of each sequence.
        lengths: int32 [b], tokens of each sequence in pages; slots behind them may hold garbage.
        statistics: Statistics of the keys; None for keys that are stored as they are.
    """

    pages: Pages | Blocks
    quantizers: tuple[Quantizer, Quantizer]
    table: Array
    lengths: Array
    statistics: Statistics | None


def attend_packed(
    query: Float[Array, "b t h_q d"], tokens: PackedTokens, positions: Int[Array, "b t"], options: LogitOptions
) -> Partial:
    """Partial attention over packed tokens by the reference, for queries and outputs in the original basis.

    Args:
        query: Queries, float32.
        tokens: The tokens.
        positions: Position of each query, counted like the tokens of the pages.
        options: Logit options.
    """
    key_quantizer, value_quantizer = tokens.quantizers
    bias = None
    if tokens.statistics is not None:
        group = query.shape[2] // tokens.statistics[0].shape[1]
        mean, weight = (jnp.repeat(x, group, axis=1)[:, None] for x in tokens.statistics)
        bias = jnp.sum(query * mean, axis=-1) * options.scale
        query = query / weight
    rotated = to_rotated(key_quantizer, query)
    key, value = key_quantizer.spec, value_quantizer.spec
    sketch = sketch_query(key_quantizer, rotated) * sketch_gain(key.dim) if key.kind == "prod" else None
    read = (rotated, tokens.pages, tokens.table, tokens.lengths, positions, key.format, value.format)
    partial = decode_attention(PagedArguments(*read, options, bias, sketch), implementation="reference")
    return Partial(from_rotated(value_quantizer, partial.acc), partial.peak, partial.total)


def finish(
    partial: Partial, sink_logits: Float[Array, "h_q"] | None, exists: Bool[Array, "b t"]
) -> Float[Array, "b t h_q d"]:
    """Outputs from attention over all keys: learned sinks added, divided; zero for padding and where no key is seen."""
    if sink_logits is not None:
        logits = jnp.broadcast_to(sink_logits.astype(jnp.float32)[None, None], partial.peak.shape)
        partial = merge(partial, Partial(jnp.zeros_like(partial.acc), logits, jnp.ones_like(partial.total)))
    out = partial.acc / jnp.where(partial.total > 0, partial.total, 1.0)[..., None]
    return jnp.where(exists[:, :, None, None], out, 0.0)


@functools.partial(jax.jit, static_argnames=("options",))
def attend_paged(
    query: Float[Array, "b t h_q d"],
    pages: Pages | Blocks,
    quantizers: tuple[Quantizer, Quantizer],
    table: Int[Array, "b n"],
    lengths: Int[Array, "b"],
    counts: Int[Array, "b"],
    *,
    options: LogitOptions,
    statistics: Statistics | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
) -> Float[Array, "b t h_q d"]:
    """Causal attention of the last queries of each sequence over its packed pages, by the reference.

    Args:
        query: Queries after rotary embedding, of any float type.
        pages: The pools, or the blocks that hold the pages.
        quantizers: Quantizers of keys and of values.
        table: Page of each run of page_size tokens of each sequence.
        lengths: Tokens of each sequence, those of the queries included.
        counts: Queries of each sequence, the last of its tokens; right-padded.
        options: Logit options.
        statistics: Statistics of the keys; None for keys that are stored as they are.
        sink_logits: A learned logit per head that takes part in the softmax and has no value.

    Returns:
        Outputs in the type of the queries; zero for padding.
    """
    step = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    tokens = PackedTokens(pages, quantizers, table, lengths, statistics)
    partial = attend_packed(query.astype(jnp.float32), tokens, (lengths - counts)[:, None] + step, options)
    return finish(partial, sink_logits, step < counts[:, None]).astype(query.dtype)
