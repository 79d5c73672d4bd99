"""Attention over a compressed cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
from pallas_kernels.attention.chunk import attend_chunk, attend_only
from pallas_kernels.attention.pipeline import check_attend, fuses_heads
from pallas_kernels.attention.whole_cache import LONGEST, attend_before, attend_cache_joint
from pallas_kernels.dispatch import Chosen, Implementation, choose, interprets
from pallas_kernels.layer import Heads, JointHeads
from pallas_kernels.tiles.rotation_triton import Basis, Segment
from tq_jax import attention_reference
from tq_jax.attention_checks import checked, visible_tokens
from tq_jax.cache import Cache, require_no_explicit_axes
from tq_jax.cache_spec import CacheSpec
from tq_jax.gradients import forward_only, without_derivative
from tq_jax.paged import finish
from tq_jax.quantizer import Quantizer, sketch_gain
from tq_jax.rotation import mixing_factors

SHARED_FIELDS = ("pages", "exact_keys", "exact_values", "length", "compressed", "overflow")
"""Fields that a `Cache` and the `CacheArrays` of its kernels both have."""


def attend(
    query: Float[Array, "b t h_q d"],
    cache: Cache,
    *,
    chunk: tuple[Float[Array, "b u h_kv d"], Float[Array, "b u h_kv d"]] | None = None,
    implementation: Implementation = "auto",
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
    scale: float | None = None,
    lengths: Int[Array, "b"] | None = None,
    rows: Int[Array, "b"] | None = None,
    only: Int[Array, "b"] | None = None,
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
        lengths: Queries of each row that exist, at most t, or tokens of its chunk, right-padded; all by default.
        rows: The cache rows of the queries; all rows in order by default.
        only: Of each row's chunk the token that its single query belongs to; by default every token has a query.
        precise: Two-byte queries in the kernel however many query rows there are, see `TileConfig`; the reference is
            always precise.
        config: Tiles of the kernel, and their own `precise`, in place of those for the page size; not for the
            reference, which has no tiles.

    Returns:
        Outputs in the type of the queries. NaN for rows that overflowed; zero for padding and where no token is seen.

    Raises:
        ValueError: For shapes or options that do not fit, such as a sliding window that reaches back to tokens that the
            cache no longer holds; and, outside jit, for lengths or rows out of range.
        NotImplementedError: For an implementation that does not exist or does not support the case; for arrays that are
            spread over explicit axes of a mesh; and for a gradient through the output, which only has derivatives along
            a direction (`jax.jvp`), and on a GPU none.

    Example:
        >>> import tq_jax as tq
        >>> cache = tq.init_cache(tq.CacheSpec.recommended(num_kv_heads=2, head_dim=64, max_tokens=512), batch=1)
        >>> k = jnp.sin(jnp.arange(300 * 2 * 64.0)).reshape(1, 300, 2, 64)
        >>> tq.attend(jnp.ones((1, 1, 8, 64)), tq.append(cache, k, k)).shape
        (1, 1, 8, 64)
    """
    above_zero: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap, "scale": scale}
    require_no_explicit_axes("attend", (query, cache, chunk))
    rows, lengths, only = checked(query, cache, chunk, lengths, rows, only, sink_logits, **above_zero)
    appended = query.shape[1] if chunk is None else 0
    above_zero["sliding_window"] = visible_tokens(cache.spec, sliding_window, appended=appended)
    plan = _plan(query, cache, config=config, precise=precise, implementation=implementation, **above_zero)
    if query.size == 0:
        return jnp.zeros_like(query)
    chosen = choose(implementation, op="attend", check=functools.partial(check_attend, query.shape, cache.pages, plan))
    return _attend(query, cache, lengths, rows, only, sink_logits, chunk, plan=plan, chosen=chosen)


def attend_joint(
    joint: JointHeads,
    cache: Cache,
    *,
    implementation: Implementation = "auto",
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
    scale: float | None = None,
    lengths: Int[Array, "b"] | None = None,
    rows: Int[Array, "b"] | None = None,
    precise: bool = False,
) -> tuple[Float[Array, "b t h_q d"], Heads]:
    """`attend` of tokens that follow those of the cache, whose heads are not split yet: kernels save a launch.

    Args:
        joint: What the heads of the tokens are made of.
        cache: The cache.
        implementation: See `attend`, as are the others.
        sliding_window: Tokens that a query sees.
        softcap: Bound of logits.
        sink_logits: Learned logits without a value.
        scale: Factor of <q, k>.
        lengths: Tokens of each row that exist.
        rows: The cache rows.
        precise: Two-byte queries.

    Returns:
        Outputs in the type of the product, and the heads.

    Raises:
        ValueError: For shapes or options that do not fit.
        NotImplementedError: For an implementation that does not exist or does not support the case.
    """
    query = jax.ShapeDtypeStruct(joint.query_shape, joint.product.dtype)
    above_zero: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap, "scale": scale}
    rows, lengths, _ = checked(query, cache, None, lengths, rows, None, sink_logits, **above_zero)
    above_zero["sliding_window"] = visible_tokens(cache.spec, sliding_window, appended=0)
    plan = _plan(query, cache, config=None, precise=precise, implementation=implementation, **above_zero)
    chosen = choose(implementation, op="attend", check=functools.partial(check_attend, query.shape, cache.pages, plan))
    if chosen == "triton" and fuses_heads(joint, cache.pages):
        return _attend_joint(joint, cache, lengths, rows, sink_logits, plan=plan)
    heads = joint.split()
    chunk = heads.key, heads.value
    return _attend(heads.query, cache, lengths, rows, None, sink_logits, chunk, plan=plan, chosen=chosen), heads


@functools.partial(jax.jit, static_argnames="plan")
def _attend_joint(
    joint: JointHeads,
    cache: Cache,
    lengths: Array | None,
    rows: Array | None,
    sink_logits: Array | None,
    *,
    plan: AttendPlan,
) -> tuple[Any, Heads]:
    return attend_cache_joint(joint, arrays_of(cache), plan, rows=rows, counts=lengths, sink_logits=sink_logits)


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


def _plan(
    query: Array | jax.ShapeDtypeStruct,
    cache: Cache,
    *,
    config: TileConfig | None,
    precise: bool,
    implementation: Implementation,
    sliding_window: int | None,
    softcap: float | None,
    scale: float | None,
) -> AttendPlan:
    """The plan of a call of `attend`; a config that nothing takes is refused, never ignored."""
    if config is not None and (precise or implementation == "reference"):
        raise ValueError(
            "expected config without precise, which it has itself, and not for the reference; "
            f"got {precise=}, {implementation=}"
        )
    spec = cache.spec
    options = LogitOptions.for_head_dim(spec.head_dim, scale=scale, softcap=softcap, sliding_window=sliding_window)
    plan = attend_plan(spec, options, precise=precise, config=config)
    if config is not None and query.size and query.shape[1] > MAX_QUERY_TOKENS:
        check_attend(query.shape, cache.pages, plan)
    return plan


@functools.partial(jax.jit, static_argnames=("plan", "chosen"))
def _attend(
    query: Array,
    cache: Cache,
    lengths: Array | None,
    rows: Array | None,
    only: Array | None,
    sink_logits: Array | None,
    chunk: tuple[Array, Array] | None,
    *,
    plan: AttendPlan,
    chosen: Chosen,
) -> Array:
    """Kernels attend over cache and chunk at once if the chunk is short; otherwise the parts are merged."""
    if chosen == "triton":
        query, chunk, sink_logits = without_derivative((query, chunk, sink_logits), "attend")
    count = (query if chunk is None else chunk[0]).shape[1]
    if chosen == "triton" and only is None and (chunk is None or count <= MAX_QUERY_TOKENS):
        return _attend_by_kernels(query, cache, lengths, chunk, plan, rows=rows, sink_logits=sink_logits)
    counts = count if lengths is None else lengths[:, None]
    step = jnp.arange(count, dtype=jnp.int32)[None]
    exists = step < counts
    if chunk is None:
        positions = (cache.length if rows is None else cache.length[rows])[:, None] - counts + step
        partial = attention_reference.over_cache(query.astype(jnp.float32), cache, rows, positions, plan.options)
    else:
        partial = merge(*attend_parts(query, cache, chunk, exists, rows=rows, plan=plan, chosen=chosen, only=only))
    if only is not None:
        exists = only[:, None] < counts
    out = finish(partial, sink_logits, jnp.broadcast_to(exists, query.shape[:2]))
    overflow = cache.overflow if rows is None else cache.overflow[rows]
    return forward_only(jnp.where(overflow[:, None, None, None], jnp.nan, out).astype(query.dtype), "attend")


def _attend_by_kernels(
    query: Array,
    cache: Cache,
    lengths: Array | None,
    chunk: tuple[Array, Array] | None,
    plan: AttendPlan,
    **common: Any,
) -> Any:
    """Kernels attend over the cache and a chunk of at most MAX_QUERY_TOKENS, the output included."""
    arrays, (batch, count) = arrays_of(cache), query.shape[:2]
    if chunk is not None:
        return attend_cache(query, arrays, plan, counts=lengths, new=chunk, back=jnp.zeros(batch, jnp.int32), **common)
    if count <= LONGEST:
        return attend_cache(query, arrays, plan, counts=lengths, **common)
    # The position of a query follows from the number of tokens from it to the end of its row; so does that of a block.
    left = jnp.full(batch, count, jnp.int32) if lengths is None else lengths
    parts: list[Any] = [
        attend_cache(query[:, start : start + LONGEST], arrays, plan, counts=left - start, **common)
        for start in range(0, count, LONGEST)
    ]
    return jnp.concatenate(parts, axis=1)


def attend_parts(
    query: Array,
    cache: Cache,
    chunk: tuple[Array, Array],
    exists: Array,
    *,
    rows: Array | None,
    plan: AttendPlan,
    chosen: Chosen,
    only: Array | None = None,
) -> tuple[Partial, Partial]:
    """Attention of a chunk over the tokens of the cache, which all come before it, and over itself.

    Args:
        query: Queries [b, t, h_q, d] of any float type; [b, 1, h_q, d] with `only`.
        cache: The cache.
        chunk: Keys and values of the chunk, [b, t, h_kv, d].
        exists: bool [b, t] or [1, t], whether each token of the chunk exists.
        rows: The cache rows of the queries; None for all rows in order.
        plan: Configuration, from `attend_plan`; the reference takes its logit options only.
        chosen: "triton" for kernels, and cuDNN over the chunk where it takes the case; "reference" for jnp.
        only: int32 [b], the token of each chunk whose query is given; None for all.

    Returns:
        The two parts, to be merged.
    """
    if chosen == "triton":
        behind, exact = attend_before(query, arrays_of(cache), plan, rows=rows, first=only), query
    else:
        exact, length = query.astype(jnp.float32), cache.length if rows is None else cache.length[rows]
        places = jnp.arange(query.shape[1], dtype=jnp.int32)[None] if only is None else only[:, None]
        behind = attention_reference.over_cache(exact, cache, rows, length[:, None] + places, plan.options)
    known = _without_padding(chunk, exists, exact.dtype)
    if only is not None:
        return behind, attend_only(exact, *known, only, options=plan.options)
    how: Implementation = "auto" if chosen == "triton" else "reference"
    return behind, attend_chunk(exact, *known, options=plan.options, implementation=how)


def _without_padding(chunk: tuple[Array, Array], exists: Array, dtype: Any) -> tuple[Array, Array]:
    """Keys and values of a chunk, zero where no token exists: NaN there would outlast a weight of zero."""
    key, value = (jnp.where(exists[:, :, None, None], x.astype(dtype), 0) for x in chunk)
    return key, value


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
