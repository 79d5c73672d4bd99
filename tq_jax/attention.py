"""Attention over a compressed cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.append.slots import first_page, page_at, token_in_slot
from pallas_kernels.attention import (
    MAX_QUERY_TOKENS,
    AttendPlan,
    CacheArrays,
    LogitOptions,
    Partial,
    TileConfig,
    attend_cache,
    merge,
)
from pallas_kernels.attention.chunk import attend_chunk
from pallas_kernels.attention.pipeline import check_attend
from pallas_kernels.attention.reference import attend_tokens, nothing
from pallas_kernels.attention.whole_cache import LONGEST, attend_before
from pallas_kernels.dispatch import Implementation, choose, interprets
from pallas_kernels.tiles.rotation_triton import Basis, Segment
from tq_jax.attend_checks import check_chunk, check_query, check_rows, visible_tokens
from tq_jax.cache import Cache, from_storage, require_row_integers
from tq_jax.cache_spec import CacheSpec
from tq_jax.paged import attend_packed, finish
from tq_jax.quantizer import Quantizer, sketch_gain
from tq_jax.rotation import mixing_factors

EXACT_BLOCK = 512
"""Full-precision slots attended to at a time."""

SHARED_FIELDS = ("pages", "exact_keys", "exact_values", "length", "compressed", "overflow")
"""Fields that a `Cache` and the `CacheArrays` of its kernels both have."""


def attend(
    query: Float[Array, "b t h_q d"],
    cache: Cache,
    *,
    chunk: tuple[Float[Array, "b t h_kv d"], Float[Array, "b t h_kv d"]] | None = None,
    implementation: Implementation = "auto",
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
    scale: float | None = None,
    lengths: Int[Array, "b"] | None = None,
    rows: Int[Array, "b"] | None = None,
    precise: bool = False,
    config: TileConfig | None = None,
) -> Float[Array, "b t h_q d"]:
    """Attention of the latest tokens over everything in the cache, causal.

    The queries belong to the last t tokens appended (`append` first, then `attend`), or, if a chunk is given, to tokens
    that follow those of the cache (`attend` first, then `append`): they see each other exactly, whatever the cache will
    hold of them. Tokens are read as the cache holds them: sink tokens and window in full precision, all others from
    their codes, in the rotated basis and without reconstructing them in the original one.

    Args:
        query: Queries after rotary embedding; h_q is a multiple of the cache's KV heads.
        cache: The cache.
        chunk: Keys, after rotary embedding, and values of the queries' tokens, if the cache does not hold them yet.
        implementation: "reference" is jnp on any device; "triton" is three GPU kernels, interpreted, slowly, where JAX
            has no GPU; "auto" takes these on a GPU for every case that they support, and the reference elsewhere.
        sliding_window: A query sees itself and the sliding_window - 1 tokens before it; by default those of the cache's
            spec, or else all of them.
        softcap: Logits x become softcap * tanh(x / softcap).
        sink_logits: A learned logit per head that takes part in the softmax and has no value.
        scale: Factor of <q, k>; 1/sqrt(head_dim) by default.
        lengths: Queries of each row that exist, at most t, right-padded; all by default.
        rows: The cache rows of the queries; all rows in order by default.
        precise: Two-byte queries in the kernel however many query rows there are, see `TileConfig`; the reference is
            always precise.
        config: Tiles of the kernel, and their own `precise`, in place of those for the page size; not for the
            reference, which has no tiles.

    Returns:
        Outputs in the type of the queries. NaN for rows that overflowed; zero for padding and where no token is seen.

    Raises:
        ValueError: For shapes or options that do not fit, such as a sliding window that reaches back to tokens that the
            cache no longer holds; and, outside jit, for lengths or rows out of range.
        NotImplementedError: For an implementation that does not exist or does not support the case.

    Example:
        >>> import tq_jax as tq
        >>> cache = tq.init_cache(tq.CacheSpec.recommended(num_kv_heads=2, head_dim=64, max_tokens=512), batch=1)
        >>> k = jnp.sin(jnp.arange(300 * 2 * 64.0)).reshape(1, 300, 2, 64)
        >>> tq.attend(jnp.ones((1, 1, 8, 64)), tq.append(cache, k, k)).shape
        (1, 1, 8, 64)
    """
    spec = cache.spec
    batch = cache.rows if rows is None else rows.shape[0]
    check_query(spec, batch, query, sink_logits, sliding_window=sliding_window, softcap=softcap, scale=scale)
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"expected floating point queries, got dtype {query.dtype}")
    require_row_integers(batch, lengths=lengths, rows=rows)
    if config is not None and (precise or implementation == "reference"):
        raise ValueError(
            "expected config without precise, which it has itself, and not for the reference; "
            f"got {precise=}, {implementation=}"
        )
    check_rows(cache, query.shape[1], lengths, rows)
    if chunk is not None:
        check_chunk(spec, query, *chunk)
    rows = None if rows is None else rows.astype(jnp.int32)
    lengths = None if lengths is None else lengths.astype(jnp.int32)
    if query.size == 0:
        return jnp.zeros_like(query)
    sliding_window = visible_tokens(spec, sliding_window, appended=query.shape[1] if chunk is None else 0)
    options = LogitOptions.for_head_dim(spec.head_dim, scale=scale, softcap=softcap, sliding_window=sliding_window)
    plan = attend_plan(spec, options, precise=precise, config=config)
    check = functools.partial(check_attend, query.shape, cache.pages, plan)
    if config is not None and query.shape[1] > MAX_QUERY_TOKENS:
        check()  # a config that no kernel takes is refused, never ignored
    if choose(implementation, op="attend", check=check) == "triton":
        return _attend_by_kernels(query, cache, lengths, rows, sink_logits, chunk, plan=plan)
    return _attend_by_reference(query, cache, lengths, rows, sink_logits, chunk, options=options)


def attend_plan(
    spec: CacheSpec,
    options: LogitOptions,
    *,
    precise: bool = False,
    config: TileConfig | None = None,
    interpret: bool | None = None,
) -> AttendPlan:
    """Static configuration of the kernels that attend over a cache.

    Args:
        spec: Spec of the cache.
        options: Logit options.
        precise: See `attend`.
        config: See `attend`.
        interpret: Whether the kernels run as jnp; by default where JAX has no GPU.

    Example:
        >>> plan = attend_plan(CacheSpec.recommended(8, 128, max_tokens=32768), LogitOptions(scale=0.1))
        >>> plan.key_format.dim, plan.sink_slots
        (128, 4)
    """
    key, value = spec.key, spec.value
    return AttendPlan(
        options=options,
        key_format=None if key is None else key.format,
        value_format=None if value is None else value.format,
        sink_slots=spec.sinks,
        sketch_gain=sketch_gain(spec.head_dim),
        config=config,
        precise=precise,
        interpret=interprets() if interpret is None else interpret,
    )


@functools.partial(jax.jit, static_argnames=("plan",))
def _attend_by_kernels(
    query: Array,
    cache: Cache,
    lengths: Array | None,
    rows: Array | None,
    sink_logits: Array | None,
    chunk: tuple[Array, Array] | None,
    *,
    plan: AttendPlan,
) -> Any:
    arrays, (batch, count) = arrays_of(cache), query.shape[:2]
    common: dict[str, Any] = {"rows": rows, "sink_logits": sink_logits}
    if count <= MAX_QUERY_TOKENS and chunk is not None:
        return attend_cache(query, arrays, plan, counts=lengths, new=chunk, back=jnp.zeros(batch, jnp.int32), **common)
    if chunk is not None:
        return _attend_long_chunk(query, cache, lengths, rows, sink_logits, chunk, plan=plan)
    if count <= LONGEST:
        return attend_cache(query, arrays, plan, counts=lengths, **common)
    # The position of a query follows from the number of tokens from it to the end of its row; so does that of a block.
    left = jnp.full(batch, count, jnp.int32) if lengths is None else lengths
    parts: list[Any] = [
        attend_cache(query[:, start : start + LONGEST], arrays, plan, counts=left - start, **common)
        for start in range(0, count, LONGEST)
    ]
    return jnp.concatenate(parts, axis=1)


def _attend_long_chunk(
    query: Array,
    cache: Cache,
    lengths: Array | None,
    rows: Array | None,
    sink_logits: Array | None,
    chunk: tuple[Array, Array],
    *,
    plan: AttendPlan,
) -> Array:
    """Kernels attend over the cache, cuDNN or another kernel over the chunk itself; the two are merged."""
    count, behind = query.shape[1], attend_before(query, arrays_of(cache), plan, rows=rows)
    exists = jnp.arange(count, dtype=jnp.int32)[None] < (count if lengths is None else lengths[:, None])
    own = attend_chunk(query, *without_padding(chunk, exists, query.dtype), options=plan.options)
    return _finished(merge(behind, own), query, cache, rows, sink_logits, exists)


def without_padding(chunk: tuple[Array, Array], exists: Array, dtype: Any) -> tuple[Array, Array]:
    """Keys and values of a chunk, zero where no token exists: NaN there would outlast a weight of zero."""
    key, value = (jnp.where(exists[:, :, None, None], x.astype(dtype), 0) for x in chunk)
    return key, value


def _finished(
    partial: Partial, query: Array, cache: Cache, rows: Array | None, sink_logits: Array | None, exists: Array
) -> Array:
    """The output: zero where no query exists, NaN for rows that overflowed."""
    out = finish(partial, sink_logits, jnp.broadcast_to(exists, query.shape[:2]))
    overflow = cache.overflow if rows is None else cache.overflow[rows]
    return jnp.where(overflow[:, None, None, None], jnp.nan, out).astype(query.dtype)


def arrays_of(cache: Cache) -> CacheArrays:
    """The arrays that the kernels read, without a copy."""
    statistics, key = cache.statistics, cache.key_quantizer
    return CacheArrays(
        **{name: getattr(cache, name) for name in SHARED_FIELDS},
        mean=None if statistics is None else statistics.mean,
        weight=None if statistics is None else statistics.weight,
        key_basis=basis_of(key),
        value_basis=basis_of(cache.value_quantizer),
        sketch=None if key is None else key.sketch,
    )


def basis_of(quantizer: Quantizer | None) -> Basis | None:
    """The map `to_rotated` as arrays; None for the identity."""
    if quantizer is None or not quantizer.rotations:
        return None
    segments = []
    for rotation in quantizer.rotations:
        if rotation.ndim == 1:
            outer, inner = (jnp.asarray(factor) for factor in mixing_factors(rotation.shape[0]))
            segments.append(Segment(outer, inner, rotation))
        else:
            segments.append(Segment(rotation))
    return Basis(tuple(segments), quantizer.outliers)


@functools.partial(jax.jit, static_argnames=("options",))
def _attend_by_reference(
    query: Array,
    cache: Cache,
    lengths: Array | None,
    rows: Array | None,
    sink_logits: Array | None,
    chunk: tuple[Array, Array] | None,
    *,
    options: LogitOptions,
) -> Array:
    """Window, pages and chunk one after the other, in plain jnp."""
    rows = jnp.arange(cache.rows, dtype=jnp.int32) if rows is None else rows
    lengths = jnp.full(rows.shape, query.shape[1], jnp.int32) if lengths is None else lengths
    length = cache.length[rows]
    step = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    positions = (length - lengths if chunk is None else length)[:, None] + step
    precise = query.astype(jnp.float32)
    partial = over_cache_by_reference(precise, cache, rows, positions, options)
    exists = step < lengths[:, None]
    if chunk is not None:
        known = without_padding(chunk, exists, jnp.float32)
        own = attend_chunk(precise, *known, options=options, implementation="reference")
        partial = merge(partial, own)
    return _finished(partial, query, cache, rows, sink_logits, exists)


def over_cache_by_reference(
    query: Array, cache: Cache, rows: Int[Array, "b"], positions: Int[Array, "b t"], options: LogitOptions
) -> Partial:
    """Window and pages one after the other, for float32 queries at the given positions."""
    partial = nothing(query, query.shape[3])
    if cache.exact_keys.shape[2]:
        partial = _attend_exact(query, cache, rows, positions, options)
    if cache.pages is not None:
        partial = merge(partial, _attend_compressed(query, cache, rows, positions, options))
    return partial


def _attend_exact(
    query: Array, cache: Cache, rows: Int[Array, "b"], positions: Int[Array, "b t"], options: LogitOptions
) -> Partial:
    """Attends over sinks and ring, block by block as far as slots are in use."""
    slots = cache.exact_keys.shape[2]
    block = min(slots, EXACT_BLOCK)
    key_positions, stored = exact_positions(cache, rows)

    def attend_block(index: Array | int) -> Partial:
        start = jnp.minimum(jnp.asarray(index, jnp.int32) * block, slots - block)
        # The last block may reach back into the one before it, whose slots are not counted again.
        fresh = start + jnp.arange(block, dtype=jnp.int32)[None] >= index * block
        keys, values = (_read_block(cache, pool, rows, start, block) for pool in (cache.exact_keys, cache.exact_values))
        return attend_tokens(
            query,
            keys,
            values,
            positions=positions,
            key_positions=lax.dynamic_slice_in_dim(key_positions, start, block, axis=1),
            stored=lax.dynamic_slice_in_dim(stored, start, block, axis=1) & fresh,
            options=options,
        )

    if slots == block:
        return attend_block(0)
    used = jnp.minimum(jnp.max(cache.length[rows]), slots)
    return lax.fori_loop(
        0, (used + block - 1) // block, lambda i, part: merge(part, attend_block(i)), nothing(query, query.shape[3])
    )


def _read_block(
    cache: Cache, pool: Array, rows: Int[Array, "b"], start: Array, size: int
) -> Float[Array, "b h_kv s d"]:
    """Slots start .. start + size of some rows, without a copy of the others."""
    zero = jnp.int32(0)  # a Python number would be one of 64 bits where JAX is told to have them

    def read(row: Array) -> Array:
        return lax.dynamic_slice(pool, (row, zero, start, zero), (1, pool.shape[1], size, pool.shape[3]))[0]

    return from_storage(cache.spec, jax.vmap(read)(rows))


def exact_positions(cache: Cache, rows: Int[Array, "b"]) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
    """Position of the token in each exact slot of some rows, and whether there is one."""
    slots = cache.exact_keys.shape[2]
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows.shape[0], slots))
    length, compressed = cache.length[rows][:, None], cache.compressed[rows][:, None]
    return token_in_slot(slot, length, compressed, sink_slots=cache.spec.sinks, slots=slots)


def _attend_compressed(
    query: Array,
    cache: Cache,
    rows: Int[Array, "b"],
    positions: Int[Array, "b t"],
    options: LogitOptions,
) -> Partial:
    """Attends over the pages that are still there, whose tokens are counted from the first of them."""
    spec, statistics, compressed = cache.spec, cache.statistics, cache.compressed[rows]
    assert cache.pages is not None and cache.key_quantizer is not None and cache.value_quantizer is not None
    first = first_page(compressed, pages_per_row=spec.pages_per_row, page_size=spec.page_size)
    page = first[:, None] + jnp.arange(spec.pages_per_row, dtype=jnp.int32)[None]
    overwritten = first * spec.page_size
    return attend_packed(
        query,
        cache.pages,
        (cache.key_quantizer, cache.value_quantizer),
        page_at(page, rows[:, None], pages_per_row=spec.pages_per_row),
        compressed - overwritten,
        positions=positions - spec.sinks - overwritten[:, None],
        statistics=None if statistics is None else (statistics.mean[rows], statistics.weight[rows]),
        options=options,
    )
