"""Attention over a whole cache, full-precision slots and packed pages, by kernels; see `attention.pipeline`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.attention.exact import ExactInputs
from pallas_kernels.attention.partial import Partial
from pallas_kernels.attention.pipeline import AttendPlan, attend_joint, attend_prepared
from pallas_kernels.attention.prepare_arguments import PrepareInputs
from pallas_kernels.layer.heads import Heads, JointHeads
from pallas_kernels.pages import Pages
from pallas_kernels.pytree import pytree
from pallas_kernels.tiles.rotation_triton import Basis

LONGEST = 1024
"""Query tokens that the kernels take at a time; bounds the arrays that they hand on to each other."""


@pytree
class CacheArrays:
    """Arrays of a cache; a pytree.

    Attributes:
        pages: Packed pages, laid out as `pallas_kernels.append.slots` says; None if no token is ever compressed.
        exact_keys: [rows, h_kv, slots, d], full-precision keys: the first tokens, then a ring of the latest, token s of
            those behind the first at s % ring. float16, float32 or, as uint16, the bits of bfloat16.
        exact_values: Full-precision values, laid out like the keys.
        length: int32 [rows], tokens.
        compressed: int32 [rows], tokens that left the ring for the pages.
        overflow: bool [rows], rows whose outputs are NaN.
        mean: float32 [rows, h_kv, d], subtracted from compressed keys; None for zero.
        weight: float32 [rows, h_kv, d], multiplied to compressed keys; None, as mean, for one.
        key_basis: Basis in which compressed keys are held.
        value_basis: Basis in which compressed values are held; None for channels as they are.
        sketch: float32 [d, d], matrix of Prod keys.
    """

    pages: Pages | None
    exact_keys: Any
    exact_values: Any
    length: Any
    compressed: Any
    overflow: Any
    mean: Any = None
    weight: Any = None
    key_basis: Basis | None = None
    value_basis: Basis | None = None
    sketch: Any = None


def attend_cache(
    query: Float[Array, "b t h_q d"],
    cache: CacheArrays,
    plan: AttendPlan,
    *,
    rows: Int[Array, "b"] | None = None,
    counts: Int[Array, "b"] | None = None,
    new: tuple[Shaped[Array, "b t h_kv d"], Shaped[Array, "b t h_kv d"]] | None = None,
    back: Int[Array, "b"] | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
) -> Float[Array, "b t h_q d"] | Partial:
    """Causal attention of queries, of any number, over everything in the cache.

    Args:
        query: Queries as the model has them, of any float type.
        cache: The cache.
        plan: The configuration.
        rows: Cache row of each sequence; all rows in order by default.
        counts: Queries of each sequence, right-padded; t by default.
        new: Keys and values of the queries' own tokens, of any float type, if the cache does not hold them yet;
            MAX_QUERY_TOKENS at most.
        back: Tokens from the first query to the end of the cache row, 0 if the queries follow its tokens; `counts` by
            default, for queries of the row's last tokens.
        sink_logits: Learned logits without a value.

    Returns:
        The output in the type of the queries, zero for padding and NaN for rows that overflowed; or, if the plan says
        so, the partial attention in the original basis.

    Raises:
        NotImplementedError: For shapes or formats outside the kernels' limits.
    """
    return attend_prepared(
        prepare_inputs(query, cache, rows, counts, back, new),
        cache.pages,
        plan,
        sink_logits=sink_logits,
        **_rest(cache),
    )


def attend_before(
    query: Float[Array, "b t h_q d"],
    cache: CacheArrays,
    plan: AttendPlan,
    *,
    rows: Int[Array, "b"] | None = None,
    first: Int[Array, "b"] | None = None,
) -> Partial:
    """Partial attention of queries, of any number, that follow all tokens of the cache.

    Args:
        query: Queries as the model has them, of any float type.
        cache: The cache.
        plan: The configuration.
        rows: Cache row of each sequence; all rows in order by default.
        first: Tokens between the end of the cache row and the first query; 0 by default.

    Returns:
        The partial attention in the original basis.
    """
    batch, count = query.shape[:2]
    plan = dataclasses.replace(plan, partial=True)

    def attend_block(block: tuple[Array, Array]) -> Any:
        return attend_cache(block[0], cache, plan, rows=rows, back=block[1])

    size = min(count, LONGEST)
    blocks = -(-count // size)
    padded = jnp.pad(query, ((0, 0), (0, blocks * size - count), (0, 0), (0, 0)))
    padded = padded.reshape(batch, blocks, size, *query.shape[2:]).swapaxes(0, 1)
    back = jnp.broadcast_to(-size * jnp.arange(blocks, dtype=jnp.int32)[:, None], (blocks, batch))
    back = back if first is None else back - first[None]
    parts = lax.map(attend_block, (padded, back))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, blocks * size, *x.shape[3:])[:, :count], parts)


def attend_cache_joint(
    joint: JointHeads,
    cache: CacheArrays,
    plan: AttendPlan,
    *,
    rows: Int[Array, "b"] | None = None,
    counts: Int[Array, "b"] | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
) -> tuple[Float[Array, "b t h_q d"] | Partial, Heads]:
    """Attention of a joint product's queries over the cache, which does not hold their tokens yet, and these tokens.

    Args:
        joint: What the heads of the queries' tokens are made of; a case that `pipeline.fuses_heads`.
        cache: The cache.
        plan: The configuration.
        rows: Cache row of each sequence; all rows in order by default.
        counts: Queries of each sequence, right-padded; t by default.
        sink_logits: Learned logits without a value.

    Returns:
        As `attend_cache`, and the heads.

    Raises:
        NotImplementedError: For shapes or formats outside the kernels' limits.
    """
    assert cache.pages is not None
    back = jnp.zeros(joint.query_shape[0], jnp.int32)
    inputs = prepare_inputs(None, cache, rows, counts, back)
    return attend_joint(
        dataclasses.replace(inputs, tokens=dataclasses.replace(inputs.tokens, joint=joint)),
        cache.pages,
        plan,
        sink_logits=sink_logits,
        **_rest(cache),
    )


def _rest(cache: CacheArrays) -> dict[str, Any]:
    """What the launches read of a cache besides pages and slots."""
    return {
        "stored_dtype": cache.exact_keys.dtype,
        "value_basis": cache.value_basis,
        "overflow": cache.overflow,
    }


def prepare_inputs(
    query: Any, cache: CacheArrays, rows: Any, counts: Any, back: Any = None, new: tuple[Any, Any] | None = None
) -> PrepareInputs:
    """The arrays of a cache that the kernels read besides the pages."""
    tokens = ExactInputs(
        query=query,
        rows=rows,
        counts=counts,
        back=back,
        length=cache.length,
        compressed=cache.compressed,
        keys=cache.exact_keys if cache.exact_keys.size else None,
        values=cache.exact_values if cache.exact_values.size else None,
        new_keys=None if new is None else new[0],
        new_values=None if new is None else new[1],
    )
    return PrepareInputs(tokens, cache.mean, cache.weight, cache.key_basis, cache.sketch)
