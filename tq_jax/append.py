"""Appending tokens to a cache: into the sinks and the ring, and out of the ring into the pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.append.slots import left, page_slot, slot_of, stays
from pallas_kernels.append.statistics_triton import Observed, StatisticsPlan, update_statistics
from pallas_kernels.append.whole_cache import AppendPlan, append_cache, check_append
from pallas_kernels.dispatch import Chosen, Implementation, choose, interprets
from pallas_kernels.encode import Encoder, encode_pages
from pallas_kernels.pages import Pages
from tq_jax.attention import SHARED_FIELDS, arrays_of
from tq_jax.cache import Cache, from_storage, require_no_explicit_axes, require_row_integers, to_storage
from tq_jax.cache_spec import CacheSpec
from tq_jax.quantizer import encoder, is_traced
from tq_jax.statistics import BALANCE, EQUAL, FLOOR, MIN_TOKENS, KeyStatistics, fix_statistics, observe_queries

FEW_TOKENS = 8
"""Longest chunk, in tokens, for whose statistics one program per row is enough, and of which most change none."""


def append(
    cache: Cache,
    k: Float[Array, "b t h_kv d"],
    v: Float[Array, "b t h_kv d"],
    *,
    query: Float[Array, "b t h_q d"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    rows: Int[Array, "b"] | None = None,
    implementation: Implementation = "auto",
) -> Cache:
    """Appends one token or a chunk of tokens to every row.

    If a jitted function that donates the cache calls this function, the update happens in place.

    Args:
        cache: The cache.
        k: Keys, after rotary embedding.
        v: Values.
        query: Queries of the same tokens; only their channel-wise power is kept, for `smooth_keys`.
        lengths: Tokens of each row's chunk that exist, at most t; the rest is right padding. By default all exist.
        rows: The cache rows that k and v belong to, all different; all rows in order by default.
        implementation: "reference" is jnp on any device; "triton" is the Pallas kernels (interpreted, slowly, where JAX
            has no GPU); "auto" takes the kernels on a GPU if they support the cache, and the reference elsewhere.

    Returns:
        The new cache.

    Raises:
        ValueError: For shapes that do not fit; and, outside jit, for tokens that are NaN, infinite or too large for the
            cache's dtype or, once they leave the window, for their scale_dtype, and for a row without room for its
            chunk. Under jit, queries that attend to such tokens get NaN, and a chunk without room leaves its row as it
            was and marks the row in `cache.overflow`.
        NotImplementedError: For "triton" where the kernels do not support the case, and for arrays that are spread over
            explicit axes of a mesh.

    Example:
        >>> import tq_jax as tq
        >>> spec = tq.CacheSpec.recommended(num_kv_heads=2, head_dim=64, max_tokens=512)
        >>> cache = tq.append(tq.init_cache(spec, batch=1), jnp.ones((1, 200, 2, 64)), jnp.ones((1, 200, 2, 64)))
        >>> cache.length.tolist(), cache.compressed.tolist()
        ([200], [68])
    """
    require_no_explicit_axes("append", (cache, k, v, query))
    batch, tokens = _check_shapes(cache, k, v, query, lengths, rows)
    # Traced, so that the check computes no encoder.
    chosen = choose(implementation, op="append", check=functools.partial(jax.eval_shape, _check, cache))
    if lengths is None:
        lengths = jnp.full(batch, tokens, jnp.int32)
    rows = jnp.arange(cache.rows, dtype=jnp.int32) if rows is None else rows.astype(jnp.int32)
    lengths = lengths.astype(jnp.int32)
    traced = is_traced((cache, k, v, query, lengths, rows))
    if not traced:
        _check_values(cache, k, v, query, lengths, rows)
    if batch == 0 or tokens == 0:
        return cache
    new, fits = _append(cache, k, v, query, lengths, rows, chosen)
    if not traced and not np.asarray(fits).all():
        raise ValueError(
            f"expected tokens whose scales fit {_scale_dtypes(cache.spec)}, got larger ones leaving the window of rows "
            f"{np.asarray(rows)[~np.asarray(fits)].tolist()}; scale_dtype='float32' holds more"
        )
    return new


def _check_shapes(cache: Cache, k: Array, v: Array, query: Array | None, lengths: Array | None, rows: Array | None):
    """Returns batch and tokens of the chunk, or raises ValueError."""
    spec = cache.spec
    heads = (spec.num_kv_heads, spec.head_dim)
    batch = cache.rows if rows is None else rows.shape[0]
    if k.ndim != 4 or k.shape[0] != batch or k.shape[2:] != heads:
        raise ValueError(f"expected k of shape ({batch}, tokens, {heads[0]}, {heads[1]}), got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"expected v of the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    wrong = None if query is None else (query.ndim != 4 or query.shape[:2] != k.shape[:2] or query.shape[3] != heads[1])
    if query is not None and (wrong or query.shape[2] % heads[0]):
        raise ValueError(
            f"expected query of shape ({batch}, {k.shape[1]}, a multiple of {heads[0]}, {heads[1]}), "
            f"got {tuple(query.shape)}"
        )
    for name, array in (("k", k), ("v", v), ("query", query)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"expected {name} to be floating point, got dtype {array.dtype}")
    require_row_integers(batch, lengths=lengths, rows=rows)
    return batch, k.shape[1]


def _check_values(cache: Cache, k: Array, v: Array, query: Array | None, lengths: Array, rows: Array) -> None:
    """Raises ValueError for chunks that do not fit, bad rows and tokens that are not finite."""
    count, row = np.asarray(lengths), np.asarray(rows)
    if len(set(row.tolist())) != row.size or np.any(row < 0) or np.any(row >= cache.rows):
        raise ValueError(f"expected different rows from 0 to {cache.rows - 1}, got {row.tolist()}")
    if np.any(count < 0) or np.any(count > k.shape[1]):
        raise ValueError(f"expected lengths from 0 to {k.shape[1]}, got {count.tolist()}")
    total = np.asarray(cache.length)[row] + count
    if np.any(total > cache.spec.max_tokens):
        raise ValueError(f"expected at most max_tokens={cache.spec.max_tokens} tokens per row, got {total.tolist()}")
    exists = np.arange(k.shape[1]) < count[:, None]
    for name, array, dtype in (("k", k, cache.spec.dtype), ("v", v, cache.spec.dtype), ("query", query, "float32")):
        if array is None:
            continue
        held = jnp.asarray(array).astype(dtype).astype(jnp.float32)
        if not np.isfinite(np.asarray(held)[exists]).all():
            limit = float(jnp.finfo(dtype).max)
            raise ValueError(f"expected finite {name}, got NaN or infinity as {dtype} (at most {limit:.5g})")


def _scale_dtypes(spec: CacheSpec) -> str:
    assert spec.key is not None and spec.value is not None
    return " and ".join(sorted({spec.key.scale_dtype, spec.value.scale_dtype}))


def _check(cache: Cache) -> None:
    """Raises NotImplementedError if the kernels do not support the cache; traced, so that no encoder is computed."""
    check_append(arrays_of(cache), *_encoders(cache))


def _encoders(cache: Cache) -> list[Encoder | None]:
    quantizers = (cache.key_quantizer, cache.value_quantizer)
    return [None if q is None or cache.pages is None else encoder(q) for q in quantizers]


@functools.partial(jax.jit, static_argnames="implementation")
def _append(
    cache: Cache,
    k: Array,
    v: Array,
    query: Array | None,
    lengths: Array,
    rows: Array,
    implementation: Chosen,
) -> tuple[Cache, Bool[Array, "b"]]:
    """The new cache, and which rows compressed only tokens whose scalars are finite."""
    spec = cache.spec
    # All later steps see tokens as the ring would hold them, so that chunks and single tokens give the same codes.
    k, v = (from_storage(spec, to_storage(spec, x)) for x in (k, v))
    before, compressed = cache.length[rows], cache.compressed[rows]
    fits = before + lengths <= spec.max_tokens
    added = jnp.where(fits, lengths, 0)
    after = before + added
    step = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    exists = step < added[:, None]
    evicted = jnp.maximum(left(after, sink_slots=spec.sinks, ring=spec.ring) - compressed, 0)

    address = compressed[:, None] + step
    slots = _page_slots(spec, rows, address, compressed + evicted)
    statistics, pages = cache.statistics, cache.pages
    if statistics is not None and pages is not None:
        if implementation == "triton" and k.shape[1] <= FEW_TOKENS:
            statistics = _update_by_kernel(cache, k, query, lengths, rows)
        else:
            statistics = _update(statistics, cache, k, query, rows, before, exists, evicted)
    cache = dataclasses.replace(cache, statistics=statistics)
    if implementation == "triton":
        new = _append_by_kernels(cache, k, v, lengths, rows)
        return new, jnp.ones_like(fits) if new.pages is None else _scalars_finite(new.pages, slots)
    left_keys, left_values, finite = k, v, jnp.ones_like(fits)
    if pages is not None:
        left_keys, left_values = _leaving(cache, k, v, rows, before, address)
        pages = _compress(cache, left_keys, left_values, rows, slots)
        finite = _scalars_finite(pages, slots)

    position = before[:, None] + step
    places = dict(sink_slots=spec.sinks, ring=spec.ring)
    slot = slot_of(position, **places)
    kept = exists & stays(position, after[:, None], **places)
    place = (rows[:, None], slice(None), jnp.where(kept, slot, cache.exact_keys.shape[2]))
    # Tokens that are not kept are dropped, whatever they hold. Their places name the tokens read from the ring, and the
    # statistics that are fixed from it: XLA then knows that the ring is read before it is overwritten, and copies
    # nothing.
    read = left_keys if statistics is None else left_keys - statistics.mean[rows][:, None]
    new_keys = jnp.where(kept[:, :, None, None], k, read)
    new_values = jnp.where(kept[:, :, None, None], v, left_values)
    new = dataclasses.replace(
        cache,
        pages=pages,
        exact_keys=cache.exact_keys.at[place].set(to_storage(spec, new_keys), mode="drop"),
        exact_values=cache.exact_values.at[place].set(to_storage(spec, new_values), mode="drop"),
        length=cache.length.at[rows].set(after),
        compressed=cache.compressed.at[rows].set(compressed + evicted),
        overflow=cache.overflow.at[rows].set(cache.overflow[rows] | ~fits),
    )
    return new, finite


def _page_slots(
    spec: CacheSpec, rows: Int[Array, "b"], address: Int[Array, "b t"], compressed: Int[Array, "b"]
) -> Int[Array, "b t"]:
    """Where tokens that leave the ring go; -1 for those that stay, or that others of the chunk would overwrite."""
    if not spec.pages_per_row:
        return jnp.full_like(address, -1)
    places = dict(pages_per_row=spec.pages_per_row, page_size=spec.page_size)
    slots, there = page_slot(address, rows[:, None], compressed[:, None], **places)
    return jnp.where((address < compressed[:, None]) & there, slots, -1)


def _update(
    stats: KeyStatistics,
    cache: Cache,
    k: Array,
    query: Array | None,
    rows: Int[Array, "b"],
    before: Int[Array, "b"],
    exists: Bool[Array, "b t"],
    evicted: Int[Array, "b"],
) -> KeyStatistics:
    """Statistics with the queries of a chunk, and fixed for rows whose first token leaves."""
    leaves = evicted > 0

    def update(found: KeyStatistics) -> KeyStatistics:
        found = found if query is None else observe_queries(found, query, exists)
        return _fix(found, cache, k, rows, before, exists, ~found.ready & leaves)

    found = jax.tree.map(lambda x: x[rows], stats)
    if k.shape[1] <= FEW_TOKENS:
        # Most steps change nothing. For a long chunk a branch would cost more than it saves: nothing fuses across it.
        wanted = ~found.ready & ((query is not None) | leaves)
        found = lax.cond(jnp.any(wanted), update, lambda found: found, found)
    else:
        found = update(found)
    return jax.tree.map(lambda x, new: x.at[rows].set(new), stats, found)


def _update_by_kernel(cache: Cache, k: Array, query: Array | None, lengths: Array, rows: Array) -> KeyStatistics:
    """The same as `_update` by a kernel, for a chunk of few tokens."""
    spec = cache.spec
    window = cache.exact_keys if cache.exact_keys.size else None
    return update_statistics(
        Observed(query, to_storage(spec, k), lengths, rows, window, cache.length, cache.compressed),
        cache.statistics,
        statistics_plan(spec, interpret=interprets()),
    )


def statistics_plan(spec: CacheSpec, *, interpret: bool) -> StatisticsPlan:
    """Static configuration of the kernel of statistics."""
    return StatisticsPlan(
        sink_slots=spec.sinks,
        max_tokens=spec.max_tokens,
        center=spec.center_keys,
        smooth=spec.smooth_keys,
        least_tokens=MIN_TOKENS,
        balance=BALANCE,
        floor=FLOOR,
        equal=EQUAL,
        interpret=interpret,
    )


def _append_by_kernels(cache: Cache, k: Array, v: Array, lengths: Array, rows: Array) -> Cache:
    """The cache with a chunk; its statistics are up to date."""
    spec = cache.spec
    key, value = _encoders(cache)
    new = append_cache(
        to_storage(spec, k),
        to_storage(spec, v),
        arrays_of(cache),
        AppendPlan(spec.sinks, spec.max_tokens, interpret=interprets()),
        key=key,
        value=value,
        counts=lengths,
        rows=rows,
    )
    return dataclasses.replace(cache, **{name: getattr(new, name) for name in SHARED_FIELDS})


def _fix(
    stats: KeyStatistics,
    cache: Cache,
    k: Array,
    rows: Int[Array, "b"],
    before: Int[Array, "b"],
    exists: Bool[Array, "b t"],
    fix: Bool[Array, "b"],
) -> KeyStatistics:
    """Fixes statistics from all tokens at hand but the sinks: the ring, which still holds every one, and the chunk."""
    spec = cache.spec
    position = before[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    ring = jnp.swapaxes(from_storage(spec, cache.exact_keys[rows][:, :, spec.sinks :]), 1, 2)
    in_ring = jnp.arange(spec.ring, dtype=jnp.int32)[None] < before[:, None] - spec.sinks
    parts = [(ring, in_ring), (k, exists & (position >= spec.sinks))]
    return fix_statistics(stats, parts, fix, center=spec.center_keys, smooth=spec.smooth_keys)


def _leaving(
    cache: Cache, k: Array, v: Array, rows: Int[Array, "b"], before: Int[Array, "b"], address: Int[Array, "b t"]
) -> tuple[Array, Array]:
    """Keys and values at page addresses, from the ring where they are old and from the chunk where they are new."""
    spec = cache.spec
    position = spec.sinks + address
    index = jnp.clip(position - before[:, None], 0, k.shape[1] - 1)[:, :, None, None]
    chunk = [jnp.take_along_axis(x, index, axis=1) for x in (k, v)]
    if not spec.ring:
        return chunk[0], chunk[1]
    place = (rows[:, None], slice(None), slot_of(position, sink_slots=spec.sinks, ring=spec.ring))
    ring = [from_storage(spec, x[place]) for x in (cache.exact_keys, cache.exact_values)]
    new = (position >= before[:, None])[:, :, None, None]
    return jnp.where(new, chunk[0], ring[0]), jnp.where(new, chunk[1], ring[1])


def _compress(cache: Cache, keys: Array, values: Array, rows: Array, slots: Array) -> Pages:
    """Quantizes tokens and writes them to their page slots; tokens with negative slots are skipped."""
    assert cache.pages is not None and cache.key_quantizer is not None and cache.value_quantizer is not None
    statistics = cache.statistics
    return encode_pages(
        keys.astype(cache.spec.dtype),
        values.astype(cache.spec.dtype),
        cache.pages,
        slots,
        key=encoder(cache.key_quantizer),
        value=encoder(cache.value_quantizer),
        mean=None if statistics is None else statistics.mean[rows],
        weight=None if statistics is None else statistics.weight[rows],
        implementation="reference",
    )


def _scalars_finite(pages: Pages, slots: Int[Array, "b t"]) -> Bool[Array, "b"]:
    """Whether all stored scalars of the tokens at some page slots are finite, row by row; negative slots hold none."""
    page_size = pages.keys.scale.shape[-1]
    page, place = jnp.maximum(slots, 0) // page_size, slots % page_size
    pools = [getattr(code, name) for code in (pages.keys, pages.values) for name in ("scale", "zero", "residual")]
    stored = [jnp.isfinite(pool[page, ..., place]).reshape(*slots.shape, -1) for pool in pools if pool is not None]
    return jnp.all((slots < 0) | jnp.all(jnp.concatenate(stored, axis=2), axis=2), axis=1)
