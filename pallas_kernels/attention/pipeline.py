"""Attention in at most three launches: prepare, decode (or prefill for many queries), merge.

`prepare` rotates queries, `decode` attends to packed pages and to tokens in full precision, `merge` combines both and
leaves the rotated basis. Where decode is not launched or has no room for tokens in full precision, see `exact`, prepare
attends to them. Nothing is computed between the launches for up to MAX_QUERY_TOKENS query tokens, so that another
framework can launch the same kernels on the same arrays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.arguments import PagedArguments
from pallas_kernels.attention.decode.config import TileConfig
from pallas_kernels.attention.decode.launch_triton import (
    DIMS,
    MAX_QUERY_TOKENS,
    attend_splits,
    config_for,
    free_programs,
)
from pallas_kernels.attention.decode.launch_triton import check_supported as check_few
from pallas_kernels.attention.exact import ExactInputs, ExactPlan, exact_plan, is_light
from pallas_kernels.attention.merge_triton import MergeInputs, Splits, merge_plan, merge_splits
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial
from pallas_kernels.attention.prefill import launch_triton as prefill
from pallas_kernels.attention.prepare_arguments import Prepared, PrepareInputs
from pallas_kernels.attention.prepare_triton import num_warps_for, prepare, prepare_plan
from pallas_kernels.format import VectorFormat
from pallas_kernels.layer.heads import Heads, JointHeads, holds_heads
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
    check_attend(x.tokens.query_shape, pages, plan)
    merged, _ = _attend(
        x,
        pages,
        plan,
        _Rest(value_basis, sink_logits, overflow),
        stored_dtype=stored_dtype,
        block_table=block_table,
    )
    return merged


def fuses_heads(joint: JointHeads, pages: Pages | None) -> bool:
    """Whether `attend_joint` takes the case; `attend_prepared` takes the heads where it does not."""
    few = pages is not None and joint.query_shape[1] <= MAX_QUERY_TOKENS
    return few and holds_heads(*joint.product.shape[-2:])


def attend_joint(
    x: PrepareInputs,
    pages: Pages,
    plan: AttendPlan,
    *,
    stored_dtype: Any,
    value_basis: Basis | None = None,
    sink_logits: Any = None,
    overflow: Any = None,
) -> tuple[Any, Heads]:
    """Attends with queries that `prepare` makes out of a joint product, over a cache and their own tokens.

    Args:
        x: The joint product, slots and counters; a case that `fuses_heads`.
        pages: The pools.
        plan: The configuration.
        stored_dtype: See `attend_prepared`, as are the others.
        value_basis: Basis of compressed values.
        sink_logits: Learned logits without a value.
        overflow: Cache rows whose outputs are NaN.

    Returns:
        As `attend_prepared`, and the heads.

    Raises:
        NotImplementedError: For shapes or formats outside the kernels' limits.
    """
    check_attend(x.tokens.query_shape, pages, plan)
    rest = _Rest(value_basis, sink_logits, overflow)
    merged, prepared = _attend(x, pages, plan, rest, stored_dtype=stored_dtype)
    assert prepared.heads is not None
    return merged, prepared.heads


@dataclasses.dataclass(frozen=True)
class _Rest:
    """What only the last launch reads."""

    value_basis: Basis | None
    sink_logits: Any
    overflow: Any


def _attend(
    x: PrepareInputs, pages: Pages | None, plan: AttendPlan, rest: _Rest, *, stored_dtype: Any, block_table: Any = None
) -> tuple[Any, Prepared]:
    """The three launches: the outcome, and what the first one wrote."""
    tokens = x.tokens
    shape, dtype = tokens.query_shape, tokens.query_dtype
    late = _plan_in_decode(tokens, stored_dtype, pages, plan, pages_per_row=_pages_per_row(tokens, pages, block_table))
    prepared = prepare_queries(
        x, pages, plan, stored_dtype=stored_dtype, block_table=block_table, attend_tokens=late is None
    )
    packed, exact = None, prepared.exact
    if pages is not None and shape[1] <= MAX_QUERY_TOKENS:
        packed, beside = attend_splits(
            _arguments(prepared, pages, plan),
            None if late is None else (tokens.with_heads(prepared.heads), late),
            config=plan.config,
            precise=plan.precise,
            interpret=plan.interpret,
        )
        exact = exact if late is None else beside
    elif pages is not None:
        packed = _attend_many(_arguments(prepared, pages, plan), plan)
    merged = merge_splits(
        MergeInputs(packed, exact, rest.value_basis, rest.sink_logits, tokens.rows, tokens.counts, rest.overflow),
        merge_plan(
            shape,
            splits=1 if packed is None else packed.acc.shape[2],
            dtype="float32" if plan.partial else jnp.dtype(dtype).name,
            partial=plan.partial,
            interpret=plan.interpret,
        ),
    )
    return (Partial(*merged) if plan.partial else merged[0]), prepared


def _plan_in_decode(
    tokens: ExactInputs, stored_dtype: Any, pages: Pages | None, plan: AttendPlan, *, pages_per_row: int
) -> ExactPlan | None:
    """How decode attends over tokens in full precision; None if there are none, or if prepare does, see `exact`."""
    shape, dtype = tokens.query_shape, tokens.query_dtype
    if pages is None or shape[1] > MAX_QUERY_TOKENS:
        return None
    assert plan.key_format is not None and plan.value_format is not None
    formats = plan.key_format, plan.value_format
    if not is_light(dtype, stored_dtype, shape[3], *formats):
        return None
    config = plan.config or config_for(shape, pages, *formats, precise=plan.precise)
    how = exact_plan(
        tokens,
        stored_dtype,
        kv_heads=pages.kv_heads,
        options=plan.options,
        sink_slots=plan.sink_slots,
        num_warps=config.num_warps,
        interpret=plan.interpret,
    )
    free = free_programs(shape, pages, plan.value_format, config, pages_per_row=pages_per_row)
    return how if how is not None and how.programs <= free else None


def _pages_per_row(tokens: ExactInputs, pages: Pages | None, block_table: Any) -> int:
    if pages is None:
        return 0
    return pages.count // tokens.length.shape[0] if block_table is None else block_table.shape[1]


def prepare_queries(
    x: PrepareInputs,
    pages: Pages | None,
    plan: AttendPlan,
    *,
    stored_dtype: Any,
    block_table: Any = None,
    attend_tokens: bool = True,
) -> Prepared:
    """Launches the first kernel: queries for the pages and, if asked for, attention over tokens in full precision."""
    tokens = x.tokens
    if pages is None:
        kv_heads, page_size = tokens.keys.shape[1], 1
    else:
        kv_heads, page_size = pages.kv_heads, pages.page_size
    num_warps = num_warps_for(tokens.query_shape[3], stored_dtype)
    common: dict[str, Any] = {
        "options": plan.options,
        "kv_heads": kv_heads,
        "sink_slots": plan.sink_slots,
        "num_warps": num_warps,
        "interpret": plan.interpret,
    }
    prepared = prepare(
        x,
        prepare_plan(
            tokens.query_shape,
            exact_plan(tokens, stored_dtype, **common) if attend_tokens else None,
            pages_per_row=_pages_per_row(tokens, pages, block_table),
            page_size=page_size,
            sketch_gain=plan.sketch_gain,
            **common,
        ),
    )
    # The kernel writes tables of pages that lie in order; a given table takes the place of that.
    return prepared if block_table is None else dataclasses.replace(prepared, table=block_table)


def _arguments(prepared: Prepared, pages: Pages | None, plan: AttendPlan) -> PagedArguments:
    """Prepared queries and the pages that they attend to."""
    assert pages is not None and plan.key_format is not None and plan.value_format is not None
    where = prepared.table, prepared.lengths, prepared.positions
    formats = plan.key_format, plan.value_format
    return PagedArguments(
        prepared.query, pages, *where, *formats, plan.options, logit_bias=prepared.bias, sketch_query=prepared.sketch
    )


def _attend_many(x: PagedArguments, plan: AttendPlan) -> Splits:
    """Attends with more queries than decode takes; they come as one split."""
    found = prefill.attend_pages(x, interpret=plan.interpret)
    return Splits(*(_one_split(part, x.kv_heads) for part in (found.acc, found.peak * LOG2_E, found.total)))


def _one_split(x: jax.Array, kv_heads: int) -> jax.Array:
    """[b, t, h_q, ...] as [b, h_kv, 1, t * g, ...], the layout of splits."""
    batch, count, heads, *rest = x.shape
    x = x.reshape(batch, count, kv_heads, heads // kv_heads, *rest).swapaxes(1, 2)
    return x.reshape(batch, kv_heads, 1, count * heads // kv_heads, *rest)
