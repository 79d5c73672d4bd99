"""A cache whose tokens are shared out over the devices of a mesh axis (context parallelism), inside `jax.shard_map`.

Token p of a sequence lives on device p mod n of n devices, in a cache of the device's own whose spec is `share_spec`.
All devices so hold equally many tokens, within one; and since sink tokens and window are shared out by the same rule,
the same tokens are in full precision as in one cache, and leave their window at the same moment.

Each device attends over its own tokens; the parts are merged by log-sum-exp with two small reductions. What crosses
the axis has the size of the queries, never that of the cache.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import LogitOptions, Partial, merge
from pallas_kernels.attention.chunk import attend_chunk
from pallas_kernels.attention.pipeline import check_attend
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.numerics import HIDDEN
from tq_jax.append import append
from tq_jax.attention import attend_parts, attend_plan
from tq_jax.attention_checks import check_chunk, check_query
from tq_jax.cache import Cache, require_row_integers
from tq_jax.cache_spec import CacheSpec
from tq_jax.paged import finish


def share_spec(spec: CacheSpec, devices: int) -> CacheSpec:
    """Spec of the cache of one device.

    Args:
        spec: Spec for whole sequences.
        devices: Devices that share the tokens.

    Returns:
        The spec with each device's part of `max_tokens`, `window` and `sink_tokens`, rounded up.

    Raises:
        ValueError: If there is no device.
        NotImplementedError: If the spec has a sliding window.

    Example:
        >>> spec = share_spec(CacheSpec.recommended(8, 128, max_tokens=32768), 4)
        >>> spec.max_tokens, spec.window, spec.sink_tokens
        (8192, 32, 1)
    """
    if devices < 1:
        raise ValueError(f"devices: expected at least 1, got {devices}")
    if devices > 1:
        _require_all_tokens(spec)
    sizes = {name: -(-getattr(spec, name) // devices) for name in ("max_tokens", "window", "sink_tokens")}
    return dataclasses.replace(spec, **sizes)


def _require_all_tokens(spec: CacheSpec) -> None:
    if spec.sliding_window is not None:
        raise NotImplementedError(
            f"caches that share out tokens keep all of them: expected sliding_window=None, got {spec.sliding_window}"
        )


def append_share(
    cache: Cache,
    k: Float[Array, "b t h_kv d"],
    v: Float[Array, "b t h_kv d"],
    *,
    axis: str,
    start: Int[Array, "b"],
    query: Float[Array, "b t h_q d"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    rows: Int[Array, "b"] | None = None,
    implementation: Implementation = "auto",
) -> Cache:
    """Appends the tokens of a chunk that live on this device; every device gets the whole chunk.

    Args:
        cache: This device's cache.
        k: Keys, after rotary embedding.
        v: Values.
        axis: The mesh axis whose devices share the tokens.
        start: Position of each chunk's first token: the tokens of its row on all devices.
        query: Queries of the same tokens, see `tq_jax.append`.
        lengths: Tokens of each row's chunk that exist; all by default.
        rows: The cache rows of the chunks; all rows in order by default.
        implementation: See `tq_jax.append`.

    Returns:
        This device's new cache.
    """
    devices, device = lax.axis_size(axis), lax.axis_index(axis).astype(jnp.int32)
    batch, tokens = k.shape[:2]
    lengths = jnp.full(batch, tokens, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    first = (device - start.astype(jnp.int32)) % devices
    steps = jnp.arange(-(-tokens // devices), dtype=jnp.int32) * devices
    index = jnp.minimum(first[:, None] + steps[None], tokens - 1)[:, :, None, None]
    own_k, own_v = (jnp.take_along_axis(x, index, axis=1) for x in (k, v))
    own_query = None if query is None else jnp.take_along_axis(query, index, axis=1)
    count = own_counts(lengths, first, devices)
    return append(cache, own_k, own_v, query=own_query, lengths=count, rows=rows, implementation=implementation)


def own_counts(lengths: Int[Array, "b"], first: Int[Array, "*b"], devices: int) -> Int[Array, "b"]:
    """How many of the first `lengths` tokens of a chunk are `first`, `first` + `devices`, ... of it."""
    return (jnp.maximum(lengths - first, 0) + devices - 1) // devices


def attend_shares(
    query: Float[Array, "b t h_q d"],
    cache: Cache,
    *,
    axis: str,
    chunk: tuple[Float[Array, "b t h_kv d"], Float[Array, "b t h_kv d"]],
    implementation: Implementation = "auto",
    softcap: float | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
    scale: float | None = None,
    lengths: Int[Array, "b"] | None = None,
    rows: Int[Array, "b"] | None = None,
    precise: bool = False,
) -> Float[Array, "b t h_q d"]:
    """Attention of a chunk over the tokens of all devices of a mesh axis, and over itself, exactly and causally.

    All tokens in the caches come before the chunk (`attend_shares` first, then `append_share`). There is no sliding
    window: where it begins in a device's tokens would differ from device to device and from step to step.

    Args:
        query: Queries after rotary embedding, the same on all devices of the axis.
        cache: This device's cache.
        axis: The mesh axis whose devices share the tokens.
        chunk: Keys, after rotary embedding, and values of the queries' tokens, the same on all devices of the axis.
        implementation: See `tq_jax.attend`, as for the options that follow.
        softcap: Logits x become softcap * tanh(x / softcap).
        sink_logits: A learned logit per head that takes part in the softmax and has no value.
        scale: Factor of <q, k>; 1/sqrt(head_dim) by default.
        lengths: Queries of each row that exist, right-padded; all by default.
        rows: The cache rows of the queries; all rows in order by default.
        precise: See `tq_jax.attend`.

    Returns:
        Outputs in the type of the queries, the same on all devices of the axis. NaN for rows that overflowed on any of
        them; zero for padding.

    Raises:
        ValueError: For shapes or options that do not fit.
        NotImplementedError: For an implementation that does not exist or does not support the case, and for a cache
            with a sliding window.
    """
    spec, (batch, tokens) = cache.spec, query.shape[:2]
    _require_all_tokens(spec)
    check_query(spec, cache.rows if rows is None else batch, query, sink_logits, softcap=softcap, scale=scale)
    require_row_integers(batch, lengths=lengths, rows=rows)
    check_chunk(spec, query, *chunk)
    rows = jnp.arange(cache.rows, dtype=jnp.int32) if rows is None else rows.astype(jnp.int32)
    lengths = jnp.full(batch, tokens, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    exists = jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]
    options = LogitOptions.for_head_dim(spec.head_dim, scale=scale, softcap=softcap, sliding_window=None)
    plan = attend_plan(spec, options, precise=precise)
    check = functools.partial(check_attend, query.shape, cache.pages, plan)
    chosen = choose(implementation, op="attend", check=check)
    found, own = attend_parts(query, cache, chunk, exists, rows=rows, plan=plan, chosen=chosen)
    # NaN of one device reaches all of them in the sum.
    acc = jnp.where(cache.overflow[rows][:, None, None, None], jnp.nan, found.acc)
    merged = merge(merge_over(Partial(acc, found.peak, found.total), axis), own)
    return finish(merged, sink_logits, exists).astype(query.dtype)


def attend_stripes(
    query: Float[Array, "b t h_q d"],
    key: Float[Array, "b t h_kv d"],
    value: Float[Array, "b t h_kv d"],
    *,
    axis: str,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "b t h_q d"]:
    """Exact causal attention of a prompt over itself, token p of which is on device p mod n; padding comes last.

    Keys and values go round the devices (ring attention, arXiv:2310.01889). A query sees those of an earlier device up
    to its own place, and those of a later device up to the place before, so that all devices have equal work (striped
    attention, arXiv:2311.09431).

    Args:
        query: Queries of this device's tokens, after rotary embedding.
        key: Their keys, after rotary embedding, in the type of the queries.
        value: Their values.
        axis: The mesh axis whose devices share the tokens.
        scale: Factor of <q, k>; 1/sqrt(head_dim) by default.
        softcap: Logits x become softcap * tanh(x / softcap).

    Returns:
        Outputs of this device's tokens, in the type of the queries.
    """
    devices, device = lax.axis_size(axis), lax.axis_index(axis)
    options = LogitOptions.for_head_dim(query.shape[3], scale=scale, softcap=softcap, sliding_window=None)
    circle = [(i, (i + 1) % devices) for i in range(devices)]
    next_query = jnp.roll(query, -1, axis=1)

    def attend_next(step: Array, state: tuple[Array, Array, Partial]) -> tuple[Array, Array, Partial]:
        key, value = (lax.ppermute(x, axis, circle) for x in state[:2])
        # They come from the device `step` places before this one, round the circle.
        from_later = device < step
        part = attend_chunk(jnp.where(from_later, next_query, query), key, value, options=options)
        part = jax.tree.map(lambda late, same: jnp.where(from_later, late, same), _one_later(part), part)
        return key, value, merge(state[2], part)

    own = attend_chunk(query, key, value, options=options)
    found = lax.fori_loop(1, devices, attend_next, (key, value, own))[2]
    return (found.acc / found.total[..., None]).astype(query.dtype)


def _one_later(part: Partial) -> Partial:
    """Each query gets what was found for the place before its own, the first query nothing."""
    first = jnp.arange(part.peak.shape[1]) == 0

    def moved(x: Array, nothing: float) -> Array:
        return jnp.where(first.reshape(1, -1, *[1] * (x.ndim - 2)), nothing, jnp.roll(x, 1, axis=1))

    return Partial(moved(part.acc, 0.0), moved(part.peak, HIDDEN), moved(part.total, 0.0))


def merge_over(part: Partial, axis: str) -> Partial:
    """Combines attention over disjoint sets of keys, one per device of a mesh axis; see `merge`.

    Args:
        part: Attention over this device's keys.
        axis: The mesh axis.

    Returns:
        Attention over the keys of all devices, the same on each of them.
    """
    peak = lax.pmax(part.peak, axis)
    keep = jnp.exp(part.peak - peak)  # [b, t, h_q]
    acc, total = lax.psum((part.acc * keep[..., None], part.total * keep), axis)
    return Partial(acc, peak, total)
