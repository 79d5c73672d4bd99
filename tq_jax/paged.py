"""Attention over packed pages that a block table puts together, as serving engines keep them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.append.slots import token_in_window
from pallas_kernels.attention import LogitOptions, PagedArguments, Partial, decode_attention, merge
from pallas_kernels.attention.reference import attend_tokens
from pallas_kernels.blocks import Blocks
from pallas_kernels.pages import Pages
from pallas_kernels.pytree import pytree
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


@pytree
class HotTokens:
    """Tokens of some sequences that are read in full precision, in blocks of a page's size; a pytree.

    Attributes:
        keys: [tokens, h_kv, d], of any float type; block s has the tokens from s * page_size on.
        values: Values, laid out like the keys.
        blocks: int32 [b, n], block of each run of tokens: of the first page of the sequence, if `first`, then of those
            from token begin + packed on.
        begin: int32 [b], first tokens that are read here: those of a page, or 0.
        packed: int32 [b], tokens behind these that are read from pages; the rest is read here.
        first: Whether there are blocks for first pages (static).
    """

    keys: Array
    values: Array
    blocks: Array
    begin: Array
    packed: Array
    first: bool = dataclasses.field(metadata={"static": True})


def _attend_hot(
    query: Array, hot: HotTokens, lengths: Array, positions: Array, options: LogitOptions, page_size: int
) -> Partial:
    """Partial attention of queries [b, t, h_q, d] at positions [b, t] over tokens in full precision."""
    slot = jnp.arange(hot.blocks.shape[1] * page_size, dtype=jnp.int32)[None]
    place = jnp.repeat(hot.blocks, page_size, axis=1) * page_size + slot % page_size  # [b, s]
    ends = (x[:, None] for x in (lengths, hot.begin, hot.begin + hot.packed))
    token, stored = token_in_window(slot, *ends, first=page_size if hot.first else 0)  # [b, s] each
    keys, values = (x[place].swapaxes(1, 2) for x in (hot.keys, hot.values))
    return attend_tokens(query, keys, values, positions=positions, key_positions=token, stored=stored, options=options)


def _attend_all(
    query: Array,
    pages: Pages | Blocks,
    quantizers: tuple[Quantizer, Quantizer],
    table: Array,
    lengths: Array,
    positions: Array,
    options: LogitOptions,
    statistics: Statistics | None,
    hot: HotTokens | None,
) -> Partial:
    """Partial attention of float32 queries at positions over packed tokens and those in full precision."""
    if hot is None:
        tokens = PackedTokens(pages, quantizers, table, lengths, statistics)
        return attend_packed(query, tokens, positions, options)
    tokens = PackedTokens(pages, quantizers, table, hot.packed, statistics)
    packed = attend_packed(query, tokens, positions - hot.begin[:, None], options)
    return merge(packed, _attend_hot(query, hot, lengths, positions, options, pages.page_size))


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
    hot: HotTokens | None = None,
) -> Float[Array, "b t h_q d"]:
    """Causal attention of the last queries of each sequence over its packed pages, by the reference.

    Args:
        query: Queries after rotary embedding, of any float type.
        pages: The pools, or the blocks that hold the pages.
        quantizers: Quantizers of keys and of values.
        table: Page of each run of page_size tokens of each sequence, from its first token in pages on.
        lengths: Tokens of each sequence, those of the queries included.
        counts: Queries of each sequence, the last of its tokens; right-padded.
        options: Logit options.
        statistics: Statistics of the keys; None for keys that are stored as they are.
        sink_logits: A learned logit per head that takes part in the softmax and has no value.
        hot: Tokens in full precision; None for sequences whose tokens are all read from pages.

    Returns:
        Outputs in the type of the queries; zero for padding.
    """
    step = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    positions = (lengths - counts)[:, None] + step
    given = pages, quantizers, table, lengths, positions, options, statistics, hot
    partial = _attend_all(query.astype(jnp.float32), *given)
    return finish(partial, sink_logits, step < counts[:, None]).astype(query.dtype)
