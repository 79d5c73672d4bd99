"""Attention over packed pages that a block table puts together, as serving engines keep them, by kernels.

The pages may hold every token of a sequence, or all but the first and the latest ones. These lie in full precision in
the slots of a cache, sink slots and a ring, or in blocks of a pool (see `pallas_kernels.append.slots`).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.exact import ExactInputs
from pallas_kernels.attention.partial import Partial
from pallas_kernels.attention.pipeline import AttendPlan, attend_prepared
from pallas_kernels.attention.prepare_arguments import PrepareInputs
from pallas_kernels.pages import Pages
from pallas_kernels.pytree import pytree
from pallas_kernels.tiles.rotation_triton import Basis


@pytree
class PagedArrays:
    """The arrays of a layer's pages that attention reads, the same in every call; a pytree.

    Attributes:
        pages: Pools of packed keys and values.
        key_basis: Basis in which compressed keys are held; None for channels as they are.
        value_basis: Basis in which compressed values are held; None for channels as they are.
        sketch: float32 [d, d], matrix of Prod keys; None for other keys.
        exact_keys: [tokens, h_kv, d], keys in full precision, in blocks of a page's size: block s has the tokens from s
            * page_size on. float16, float32 or, as uint16, the bits of bfloat16. None if there are none.
        exact_values: Values in full precision, laid out like the keys.
    """

    pages: Pages
    key_basis: Basis | None
    value_basis: Basis | None
    sketch: Any = None
    exact_keys: Any = None
    exact_values: Any = None


@pytree
class FullPrecisionSegment:
    """Tokens of sequences that are not read from pages; a pytree.

    Attributes:
        keys: [b, h_kv, slots, d], full-precision keys: the plan's `sink_slots` for the first tokens, then a ring of
            the latest. float16, float32 or, as uint16, the bits of bfloat16.
        values: Full-precision values, laid out like the keys.
        compressed: int32 [b], tokens that are read from the pages: those behind the sinks and before the ring's.
    """

    keys: Any
    values: Any
    compressed: Int[Array, "b"]


@pytree
class FullPrecisionBlocks:
    """Tokens of sequences that are read from the blocks in full precision of `PagedArrays`; a pytree.

    Attributes:
        table: int32 [b, n], block of each run of page_size tokens: if the plan has sink slots, of the first ones of the
            sequence, then of those from token begin + compressed on. Arbitrary, but a block, where there are none.
        begin: int32 [b], first tokens that are read there: the plan's `sink_slots`, which are a page's, or 0.
        compressed: int32 [b], tokens behind these that are read from the pages.
    """

    table: Int[Array, "b n"]
    begin: Int[Array, "b"]
    compressed: Int[Array, "b"]


def prepare_inputs(
    x: PagedArrays,
    lengths: Int[Array, "b"],
    segment: FullPrecisionSegment | FullPrecisionBlocks | None,
    statistics: tuple[Float[Array, "b h_kv d"], Float[Array, "b h_kv d"]] | None,
    **queries: Any,
) -> PrepareInputs:
    """What the first launch reads of sequences over pages.

    Args:
        x: Pages, bases, sketch and blocks in full precision.
        lengths: int32, tokens of each sequence.
        segment: Tokens in full precision; None if all tokens are read from pages.
        statistics: See `attend_block_table`.
        **queries: The queries' fields of `ExactInputs`.
    """
    if segment is None:
        tokens = ExactInputs(length=lengths, compressed=lengths, **queries)
    elif isinstance(segment, FullPrecisionSegment):
        exact = dict(keys=segment.keys, values=segment.values)
        tokens = ExactInputs(length=lengths, compressed=segment.compressed, **exact, **queries)
    else:
        tokens = ExactInputs(
            length=lengths,
            compressed=segment.compressed,
            keys=x.exact_keys,
            values=x.exact_values,
            table=segment.table,
            begin=segment.begin,
            block_size=x.pages.page_size,
            **queries,
        )
    mean, weight = (None, None) if statistics is None else statistics
    return PrepareInputs(tokens, mean, weight, x.key_basis, x.sketch)


def attend_block_table(
    query: Float[Array, "b t h_q d"],
    x: PagedArrays,
    block_table: Int[Array, "b n"],
    lengths: Int[Array, "b"],
    plan: AttendPlan,
    *,
    counts: Int[Array, "b"] | None = None,
    statistics: tuple[Float[Array, "b h_kv d"], Float[Array, "b h_kv d"]] | None = None,
    segment: FullPrecisionSegment | FullPrecisionBlocks | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
) -> Float[Array, "b t h_q d"] | Partial:
    """Causal attention of the latest queries of each sequence, of any number, over its pages.

    Args:
        query: Queries as the model has them, of any float type.
        x: Pages, bases and sketch.
        block_table: int32, page of each run of page_size tokens of each sequence, counted from the first token that is
            read from pages.
        lengths: int32, tokens of each sequence, those of the queries included.
        plan: The configuration; `sink_slots` is 0 without a segment.
        counts: int32, queries of each sequence, right-padded: its last `counts` tokens; t by default.
        statistics: Mean and channel weights of the keys of each sequence; None for keys that are stored as they are.
        segment: Tokens in full precision; None if all tokens are read from the pages.
        sink_logits: Learned logits without a value.

    Returns:
        The output in the type of the queries, zero for padding; or, if the plan says so, the partial attention in the
        original basis.

    Raises:
        ValueError: For sink slots without a segment, or with blocks of another size.
        NotImplementedError: For shapes or formats outside the kernels' limits.
    """
    if segment is None and plan.sink_slots:
        raise ValueError(f"expected sink_slots=0 without a full-precision segment, got {plan.sink_slots}")
    page_size = x.pages.page_size
    if isinstance(segment, FullPrecisionBlocks) and plan.sink_slots not in (0, page_size):
        raise ValueError(f"expected sink_slots of 0 or a block, {page_size}, got {plan.sink_slots}")
    inputs = prepare_inputs(x, lengths, segment, statistics, query=query, counts=counts)
    return attend_prepared(
        inputs,
        x.pages,
        plan,
        stored_dtype=jnp.float32 if segment is None else inputs.tokens.keys.dtype,
        block_table=block_table,
        value_basis=x.value_basis,
        sink_logits=sink_logits,
    )
