"""Cases for attention over a whole cache: types, head dims, rotations, masks and numbers of rows, with garbage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from pallas_kernels.attention.decode.config import has_pairs


def make_spec(dim: int = 64, *, bits: tuple[float, float] = (4, 4), key=None, value=None, **options) -> tq.CacheSpec:
    """A small cache of two KV heads."""
    key, value = (
        tq.QuantizerSpec(dim, **({"bits": b} | (extra or {}))) for b, extra in zip(bits, (key, value), strict=True)
    )
    defaults = dict(num_kv_heads=2, head_dim=dim, max_tokens=640, key=key, value=value, window=40, page_size=64)
    return tq.CacheSpec(**(defaults | options))


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache and queries for it.

    Attributes:
        spec: Spec of the cache.
        lengths: Tokens of each cache row.
        count: Query tokens per row.
        group: Query heads per KV head.
        dtype: Type of the queries.
        options: Options of `attend`, with "rows" and "lengths" as lists and "sink_logits" as True.
        new: Whether the queries' tokens follow those of the cache; what pads them is NaN.
    """

    spec: tq.CacheSpec = dataclasses.field(default_factory=make_spec)
    lengths: tuple[int, ...] = (333, 1, 0, 41, 64)
    count: int = 1
    group: int = 4
    dtype: str = "float32"
    options: dict = dataclasses.field(default_factory=dict)
    new: bool = False

    def tolerance(self, *, precise: bool) -> float:
        """Largest relative error: bfloat16 rounds to 2**-8; one-byte queries cost a tenth of what 4-bit codes do."""
        if not precise and not has_pairs(self.count * self.group, dim=self.spec.head_dim):
            return 0.013
        return 1e-3 if self.dtype == "float32" else 4e-3


GROUP2 = {"kind": "group", "bits": 2}
CASES = {
    "plain": Case(),
    "bfloat16": Case(make_spec(128, page_size=128, window=128), (600, 130, 7), dtype="bfloat16"),
    "float16 d80 haar": Case(
        make_spec(80, key={"rotation": "haar"}, value={"rotation": "haar"}, dtype="float16"), dtype="float16"
    ),
    "float32 d256": Case(make_spec(256, dtype="float32"), (150, 80)),
    "d96 no window": Case(make_spec(96, window=0, sink_tokens=0)),
    "d192 ring of 5": Case(make_spec(192, window=5, sink_tokens=1)),
    "fractional": Case(make_spec(128, bits=(2.5, 3.5))),
    "prod, min-max": Case(make_spec(128, key={"kind": "prod", "bits": 3}, value=GROUP2)),
    "no statistics": Case(make_spec(center_keys=False, smooth_keys=False)),
    "full precision": Case(tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=128, max_tokens=640)),
    "window, cap": Case(options={"sliding_window": 70, "softcap": 4.0, "scale": 0.3}),
    "window 1": Case(options={"sliding_window": 1}),
    "sinks, rows": Case(options={"sink_logits": True, "rows": [4, 0, 2]}),
    "8 queries": Case(count=8, options={"lengths": [8, 1, 0, 3, 8]}),
    "5 queries, everything": Case(
        make_spec(dtype="float32"),
        count=5,
        options={
            "lengths": [5, 2, 1], "rows": [3, 0, 4], "sink_logits": True, "sliding_window": 60, "softcap": 3.0,
        },
    ),
    "bfloat16, 5 queries, everything": Case(
        make_spec(64),
        count=5,
        dtype="bfloat16",
        options={
            "lengths": [5, 2, 1], "rows": [3, 0, 4], "sink_logits": True, "sliding_window": 60, "softcap": 3.0,
        },
    ),
    "bfloat16, window of 300": Case(make_spec(64, window=300, max_tokens=1024), (900, 310, 3), dtype="bfloat16"),
    "new token": Case(new=True),
    "8 new tokens, bfloat16": Case(count=8, dtype="bfloat16", options={"lengths": [8, 1, 0, 3, 8]}, new=True),
    "new token, bfloat16, group 5": Case(make_spec(128, page_size=128), group=5, dtype="bfloat16", new=True),
    "new token, no window": Case(make_spec(96, window=0, sink_tokens=0), new=True),
    "new token, full precision": Case(
        tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=128, max_tokens=640), new=True
    ),
    "5 new tokens, everything": Case(
        make_spec(dtype="float32"),
        count=5,
        options={
            "lengths": [5, 2, 1], "rows": [3, 0, 4], "sink_logits": True, "sliding_window": 60, "softcap": 3.0,
        },
        new=True,
    ),
    "20 new tokens": Case(
        make_spec(128, page_size=128),
        (333, 1, 0),
        count=20,
        dtype="bfloat16",
        options={"lengths": [20, 7, 0], "sliding_window": 90},
        new=True,
    ),
    "ring of pages": Case(make_spec(sliding_window=150)),
    "ring of pages, 5 new tokens": Case(
        make_spec(128, sliding_window=150), (333, 1, 0), count=5, options={"lengths": [5, 2, 1]}, new=True
    ),
    "ring of pages, 20 new tokens": Case(
        make_spec(128, sliding_window=100), (500, 90), count=20, dtype="bfloat16", new=True
    ),
    "ring in full precision": Case(
        tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=128, max_tokens=640, sliding_window=70)
    ),
    "group 1": Case(group=1),
    "group 16": Case(group=16, dtype="bfloat16"),
}  # fmt: skip
"""Cases by name."""


def filled_cache(spec: tq.CacheSpec, lengths: tuple[int, ...], group: int, seed: int = 0) -> tuple[tq.Cache, jax.Array]:
    """A cache of random tokens, and their queries; memory without a token is NaN or garbage."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths), spec.num_kv_heads)
    k, v = (jnp.asarray(rng.standard_normal((*shape, spec.head_dim)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((*shape[:2], shape[2] * group, spec.head_dim)), jnp.float32)
    cache = jax.tree.map(lambda x: x, tq.init_cache(spec, batch=len(lengths)))
    poison = jax.tree.map(_poisoned, (cache.pages, cache.exact_keys, cache.exact_values))
    cache = dataclasses.replace(cache, pages=poison[0], exact_keys=poison[1], exact_values=poison[2])
    return tq.append(cache, k + 1, v, query=q, lengths=jnp.asarray(lengths, jnp.int32)), q


def _poisoned(x: jax.Array) -> jax.Array:
    value = {"uint8": 0xA5, "uint16": 0x7FC0}.get(x.dtype.name, float("nan"))
    return jnp.full_like(x, value)


def attend_case(case: Case) -> tuple[functools.partial, jax.Array, tq.Cache]:
    """`attend` with the options of a case, its queries and its cache."""
    cache, query = filled_cache(case.spec, case.lengths, case.group)
    options = dict(case.options)
    if options.pop("sink_logits", False):
        options["sink_logits"] = jnp.linspace(-1.0, 4.0, query.shape[2])
    for name in ("rows", "lengths"):
        if name in options:
            options[name] = jnp.asarray(options[name], jnp.int32)
    rows = options.get("rows", jnp.arange(len(case.lengths), dtype=jnp.int32))
    query = query[rows][:, : case.count].astype(case.dtype)
    if case.new:
        options["chunk"] = new_tokens(case, query, options.get("lengths"))
    return functools.partial(tq.attend, **options), query, cache


def new_tokens(case: Case, query: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the queries' tokens, NaN where none exists."""
    rng = np.random.default_rng(1)
    shape = (*query.shape[:2], case.spec.num_kv_heads, case.spec.head_dim)
    exists = jnp.arange(shape[1])[None] < (shape[1] if lengths is None else lengths[:, None])
    tokens = (jnp.asarray(rng.standard_normal(shape), case.dtype) for _ in range(2))
    key, value = (jnp.where(exists[:, :, None, None], x, jnp.nan) for x in tokens)
    return key, value


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """Norm of the difference over the norm of the wanted outputs; NaN counts as infinite."""
    a, b = (np.asarray(x, np.float64) for x in (got, want))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return error if np.isfinite(error) else float("inf")
