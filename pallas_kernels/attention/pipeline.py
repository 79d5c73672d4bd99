"""Attention in at most three launches: prepare, decode (or prefill for many queries), merge.

`prepare` rotates queries and attends to full-precision slots; `decode` attends to packed pages; `merge` combines both
and leaves the rotated basis. Nothing is computed between the launches for up to MAX_QUERY_TOKENS query tokens, so that
another framework can launch the same kernels on the same arrays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.arguments import PagedArguments
from pallas_kernels.attention.decode.config import TileConfig
from pallas_kernels.attention.decode.launch_triton import DIMS, MAX_QUERY_TOKENS, attend_splits
from pallas_kernels.attention.decode.launch_triton import check_supported as check_few
from pallas_kernels.attention.merge_triton import MergeInputs, Splits, merge_plan, merge_splits
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial
from pallas_kernels.attention.prefill import launch_triton as prefill
from pallas_kernels.attention.prepare_arguments import Prepared, PrepareInputs
from pallas_kernels.attention.prepare_triton import prepare, prepare_plan
from pallas_kernels.format import VectorFormat
from pallas_kernels.numerics import LOG2_E
from pallas_kernels.pages import Pages
from pallas_kernels.tiles.rotation_triton import Basis


@dataclasses.dataclass(frozen=True)
class AttendPlan:
    """Static configuration of attention over pages and full-precision slots.

    Attributes:
        options: Logit options.
        key_format: Format of compressed keys; None without pages.
        value_format: Format of compressed values; None without pages.
        sink_slots: Full-precision slots before the ring.
        sketch_gain: Factor of the sketch of queries.
        config: Tiles of the decode kernel; None for those of the page size.
        precise: Whether the tiles by default are precise ones, see `TileConfig`.
        partial: Whether the outcome is a `Partial` in float32 instead of the output.
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


def check_attend(query_shape: tuple[int, ...], pages: Pages | None, plan: AttendPlan) -> None:
    """Raises NotImplementedError, naming value and limit, if the kernels do not support the case.

    Args:
        query_shape: [b, t, h_q, d].
        pages: The pools, or their shapes; None without compressed tokens.
        plan: The configuration.
    """
    if pages is not None:
        assert plan.key_format is not None and plan.value_format is not None
        formats = plan.key_format, plan.value_format
        if query_shape[1] <= MAX_QUERY_TOKENS:
            check_few(query_shape, pages, *formats, plan.config, precise=plan.precise)
        elif plan.config is not None:
            raise NotImplementedError(
                f"config cuts up to {MAX_QUERY_TOKENS} query tokens into tiles, got {query_shape[1]}"
            )
        else:
            prefill.check_supported(query_shape, pages, *formats, None)
    if query_shape[3] not in DIMS:
        raise NotImplementedError(f"the Triton kernels have head dims {DIMS}, got {query_shape[3]}")


def attend_prepared(
    x: PrepareInputs,
    pages: Pages | None,
    plan: AttendPlan,
    *,
    stored_dtype: Any = jnp.float32,
    block_table: Any = None,
    value_basis: Basis | None = None,
    sink_logits: Any = None,
    overflow: Any = None,
) -> Any:
    """Attends with queries over full-precision slots and pages.

    Args:
        x: Queries, slots and counters, as `prepare` reads them.
        pages: The pools; None without compressed tokens.
        plan: The configuration.
        stored_dtype: Type of full-precision slots, uint16 for bfloat16, where there may be none.
        block_table: int32 [b, n], page of each run of page_size tokens; None if the pages of cache row r lie where
            `pallas_kernels.append.slots` says.
        value_basis: Basis of compressed values; None for channels as they are.
        sink_logits: [h_q], learned logits without a value.
        overflow: bool [rows], cache rows whose outputs are NaN.

    Returns:
        The output in the type of the queries, zero for padding and NaN for rows that overflowed; or, if the plan says
        so, the partial attention in the original basis.

    Raises:
        NotImplementedError: For shapes or formats outside the kernels' limits.
    """
    check_attend(x.query.shape, pages, plan)
    prepared = prepare_queries(x, pages, plan, stored_dtype=stored_dtype, block_table=block_table)
    exact = None if prepared.acc is None else Splits(prepared.acc, prepared.peak, prepared.total)
    packed = None if pages is None else _attend_pages(prepared, pages, plan)
    merged = merge_splits(
        MergeInputs(packed, exact, value_basis, sink_logits, x.rows, x.counts, overflow),
        merge_plan(
            x.query.shape,
            splits=1 if packed is None else packed.acc.shape[2],
            dtype="float32" if plan.partial else jnp.dtype(x.query.dtype).name,
            partial=plan.partial,
            interpret=plan.interpret,
        ),
    )
    return Partial(*merged) if plan.partial else merged[0]


def prepare_queries(
    x: PrepareInputs, pages: Pages | None, plan: AttendPlan, *, stored_dtype: Any, block_table: Any = None
) -> Prepared:
    """Launches the first kernel: queries for the pages, and attention over full-precision slots."""
    batch, _, _, dim = x.query.shape
    cache_rows = x.length.shape[0]
    if pages is None:
        kv_heads, pages_per_row, page_size = x.keys.shape[1], 0, 1
    else:
        kv_heads, page_size = pages.keys.packed.shape[1:3]
        pages_per_row = pages.keys.packed.shape[0] // cache_rows if block_table is None else block_table.shape[1]
    without_slots = (batch, kv_heads, 0, dim)
    prepared = prepare(
        x,
        prepare_plan(
            x.query.shape,
            without_slots if x.keys is None else x.keys.shape,
            stored_dtype,
            options=plan.options,
            sink_slots=plan.sink_slots,
            pages_per_row=pages_per_row,
            page_size=page_size,
            sketch_gain=plan.sketch_gain,
            interpret=plan.interpret,
        ),
    )
    # The kernel writes tables of pages that lie in order; a given table takes the place of that.
    return prepared if block_table is None else dataclasses.replace(prepared, table=block_table)


def _attend_pages(prepared: Prepared, pages: Pages, plan: AttendPlan) -> Splits:
    """Attends with prepared queries, of any number, over packed pages; many queries come as one split."""
    assert plan.key_format is not None and plan.value_format is not None
    where = prepared.table, prepared.lengths, prepared.positions
    formats = plan.key_format, plan.value_format
    arguments = PagedArguments(
        prepared.query, pages, *where, *formats, plan.options, logit_bias=prepared.bias, sketch_query=prepared.sketch
    )
    if prepared.query.shape[1] <= MAX_QUERY_TOKENS:
        return attend_splits(arguments, config=plan.config, precise=plan.precise, interpret=plan.interpret)
    found = prefill.attend_pages(arguments, interpret=plan.interpret)
    kv_heads = pages.keys.packed.shape[1]
    return Splits(*(_one_split(x, kv_heads) for x in (found.acc, found.peak * LOG2_E, found.total)))


def _one_split(x: jax.Array, kv_heads: int) -> jax.Array:
    """[b, t, h_q, ...] as [b, h_kv, 1, t * g, ...], the layout of splits."""
    batch, count, heads, *rest = x.shape
    x = x.reshape(batch, count, kv_heads, heads // kv_heads, *rest).swapaxes(1, 2)
    return x.reshape(batch, kv_heads, 1, count * heads // kv_heads, *rest)
