"""Attention over a whole cache in at most three launches: prepare, decode and merge.

Nothing is computed between them, so that another framework can launch the same kernels on the same arrays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.decode.config import TileConfig
from pallas_kernels.attention.decode.launch_triton import DIMS, check_supported, decode, decode_plan
from pallas_kernels.attention.decode.plan import DecodeInputs
from pallas_kernels.attention.merge_triton import MergeInputs, Splits, merge_plan, merge_splits
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial
from pallas_kernels.attention.prepare_triton import Prepared, PrepareInputs, prepare, prepare_plan
from pallas_kernels.format import VectorFormat
from pallas_kernels.pages import Pages
from pallas_kernels.tiles.rotation_triton import Basis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheArrays:
    """Arrays of a cache; a pytree.

    Attributes:
        pages: Packed pages, page p of row r at r * pages_per_row + p; None if no token is ever compressed.
        exact_keys: [rows, h_kv, slots, d], full-precision keys: the first tokens, then a ring of the latest, token s of
            those behind the first at s % ring. float16, float32 or, as uint16, the bits of bfloat16.
        exact_values: Likewise.
        length: int32 [rows], tokens.
        compressed: int32 [rows], tokens in the pages.
        overflow: bool [rows], rows whose outputs are NaN.
        mean: float32 [rows, h_kv, d], subtracted from compressed keys; None for zero.
        weight: float32 [rows, h_kv, d], multiplied to compressed keys; None, as mean, for one.
        key_basis: In which compressed keys are held.
        value_basis: Likewise of values; None for channels as they are.
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


@dataclasses.dataclass(frozen=True)
class AttendPlan:
    """What is static about attention over a cache.

    Attributes:
        options: Logit options.
        key_format: Of compressed keys; None without pages.
        value_format: Likewise.
        sink_slots: Full-precision slots before the ring.
        sketch_gain: Factor of the sketch of queries.
        config: Tiles of the decode kernel; None for those of the page size.
        precise: Whether the tiles by default are precise ones.
        partial: Whether the outcome is a Partial in float32 instead of the output.
        interpret: Whether the kernels run as jnp.
    """

    options: LogitOptions
    key_format: VectorFormat | None
    value_format: VectorFormat | None
    sink_slots: int
    sketch_gain: float = 1.0
    config: TileConfig | None = None
    precise: bool = False
    partial: bool = False
    interpret: bool = False


def check_attend(query_shape: tuple[int, ...], cache: CacheArrays, plan: AttendPlan) -> None:
    """Raises NotImplementedError, naming value and limit, for what the kernels do not do."""
    if cache.pages is not None:
        assert plan.key_format is not None and plan.value_format is not None
        check_supported(query_shape, cache.pages, plan.key_format, plan.value_format, plan.config, precise=plan.precise)
    if query_shape[3] not in DIMS:
        raise NotImplementedError(f"the Triton kernels have head dims {DIMS}, got {query_shape[3]}")


def attend_cache(
    query: Float[Array, "b t h_q d"],
    cache: CacheArrays,
    plan: AttendPlan,
    *,
    rows: Int[Array, "b"] | None = None,
    counts: Int[Array, "b"] | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
) -> Float[Array, "b t h_q d"] | Partial:
    """Causal attention of the last queries of each row over everything in the cache.

    Args:
        query: Queries as the model has them, of any float type.
        cache: The cache.
        plan: What is static.
        rows: Cache row of each sequence; all in order by default.
        counts: Queries of each sequence, right-padded; t by default.
        sink_logits: Learned logits without a value.

    Returns:
        The output in the type of the queries, zero for padding and NaN for rows that overflowed; or, if the plan says
        so, the partial attention in the original basis.

    Raises:
        NotImplementedError: For shapes or formats outside the kernels' limits.
    """
    check_attend(query.shape, cache, plan)
    prepared = prepare_cache(query, cache, plan, rows, counts)
    exact = None if prepared.acc is None else Splits(prepared.acc, prepared.peak, prepared.total)
    packed = _decode(prepared, cache, plan)
    merged = merge_splits(
        MergeInputs(
            packed=packed,
            exact=exact,
            basis=cache.value_basis,
            sink_logits=sink_logits,
            rows=rows,
            counts=counts,
            overflow=cache.overflow,
        ),
        merge_plan(
            query.shape,
            splits=1 if packed is None else packed.acc.shape[2],
            dtype="float32" if plan.partial else jnp.dtype(query.dtype).name,
            partial=plan.partial,
            interpret=plan.interpret,
        ),
    )
    return Partial(*merged) if plan.partial else merged[0]


def prepare_cache(query: Any, cache: CacheArrays, plan: AttendPlan, rows: Any, counts: Any) -> Prepared:
    """Launches the first kernel: queries for the pages, and attention over full-precision slots."""
    return prepare(
        PrepareInputs(
            query=query,
            rows=rows,
            counts=counts,
            length=cache.length,
            compressed=cache.compressed,
            keys=cache.exact_keys if cache.exact_keys.size else None,
            values=cache.exact_values if cache.exact_values.size else None,
            mean=cache.mean,
            weight=cache.weight,
            basis=cache.key_basis,
            sketch=cache.sketch,
        ),
        prepare_plan(
            query.shape,
            cache.exact_keys.shape,
            cache.exact_keys.dtype,
            options=plan.options,
            sink_slots=plan.sink_slots,
            pages_per_row=0 if cache.pages is None else cache.pages.keys.packed.shape[0] // cache.length.shape[0],
            sketch_gain=plan.sketch_gain,
            interpret=plan.interpret,
        ),
    )


def _decode(prepared: Prepared, cache: CacheArrays, plan: AttendPlan) -> Splits | None:
    if cache.pages is None:
        return None
    assert plan.key_format is not None and plan.value_format is not None
    decoding, num_warps, num_stages = decode_plan(
        prepared.query.shape,
        cache.pages,
        prepared.table.shape[1],
        key_format=plan.key_format,
        value_format=plan.value_format,
        options=plan.options,
        config=plan.config,
        precise=plan.precise,
        interpret=plan.interpret,
    )
    inputs = DecodeInputs(
        query=prepared.query,
        pages=cache.pages,
        table=prepared.table,
        lengths=prepared.lengths,
        positions=prepared.positions,
        bias=prepared.bias,
        sketch=prepared.sketch,
    )
    return decode(inputs, plan.value_format.dim, decoding, num_warps=num_warps, num_stages=num_stages)
