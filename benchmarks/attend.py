"""Attention over a whole cache on a GPU: parity of the three kernels with the reference, and times against cuDNN.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/attend.py --limit 120 --json attend.json

Kernel times are CUPTI's, every kernel of a call by name, of calls that read other rows each time where the rows of one
would fit the L2 cache; end-to-end times are those of a call in a jitted chain of calls. Rows are written at once.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from benchmarks.decode import (
    DIM,
    KV_HEADS,
    PAGE,
    Q_HEADS,
    ROTATED_BYTES,
    SHAPES,
    Results,
    copy_bandwidth,
    end_to_end,
    guarded,
    time_cudnn,
)
from tq_jax.quantizer import to_rotated

WINDOW, SINKS, CHAIN = 128, 4, 16


def make_spec(dim: int = 64, *, bits: tuple[float, float] = (4, 4), key=None, value=None, **options) -> tq.CacheSpec:
    """A small cache of two KV heads."""
    key, value = (
        tq.QuantizerSpec(dim, **({"bits": b} | (extra or {}))) for b, extra in zip(bits, (key, value), strict=True)
    )
    defaults = dict(num_kv_heads=2, head_dim=dim, max_tokens=640, key=key, value=value, window=40, page_size=64)
    return tq.CacheSpec(**(defaults | options))


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of parity.

    Attributes:
        spec: Of the cache.
        lengths: Tokens of each row.
        count: Query tokens.
        group: Query heads a KV head.
        dtype: Of queries.
        options: Of `attend`; "rows" and "lengths" as lists.
        tolerance: Relative error that one-byte queries and probabilities may have.
    """

    spec: tq.CacheSpec = dataclasses.field(default_factory=make_spec)
    lengths: tuple[int, ...] = (333, 1, 0, 41, 64)
    count: int = 1
    group: int = 4
    dtype: str = "float32"
    options: dict = dataclasses.field(default_factory=dict)
    tolerance: float = 0.015


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
    "group 1": Case(group=1),
    "group 16": Case(group=16, dtype="bfloat16"),
}  # fmt: skip
"""Cases by name."""


def filled_cache(spec: tq.CacheSpec, lengths: tuple[int, ...], group: int, seed: int = 0) -> tuple[tq.Cache, jax.Array]:
    """A cache of random tokens and their queries; whatever holds no token is NaN or garbage."""
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
    return functools.partial(tq.attend, **options), query, cache


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """Norm of the difference over that of what is wanted; NaN counts as infinite."""
    a, b = (np.asarray(x, np.float64) for x in (got, want))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return error if np.isfinite(error) else float("inf")


def check_parity(results: Results) -> None:
    for name, case in CASES.items():
        attend, query, cache = attend_case(case)
        want = attend(query, cache, implementation="reference")
        for precise in (False, True) if case.count * case.group <= 8 else (False,):
            if results.over:
                return
            row = {"case": name, "precise": precise}
            try:
                got = attend(query, cache, implementation="triton", precise=precise)
                again = attend(query, cache, implementation="triton", precise=precise)
                row["error"] = relative_error(got, want)
                row["same_twice"] = bool(jnp.array_equal(got, again))
                # Outputs of 16 bits are rounded to 2**-8.
                limit = (1e-3 if case.dtype == "float32" else 4e-3) if precise else case.tolerance
                row["ok"] = row["same_twice"] and row["error"] <= limit
            except Exception as error:
                row |= {"ok": False, "failed": repr(error)[:400]}
            results.add("parity", row)


def random_cache(spec: tq.CacheSpec, rows: int, length: int) -> tq.Cache:
    """A cache of random bytes and positive scales, as if filled to a length."""
    cache = tq.init_cache(spec, batch=rows)
    leaves, tree = jax.tree.flatten((cache.pages, cache.exact_keys, cache.exact_values))

    @functools.partial(jax.jit, static_argnums=1)
    def fill(key, leaf):
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(key, leaf.shape, jnp.uint8)
        if leaf.dtype == jnp.uint16:
            normal = jax.random.normal(key, leaf.shape, jnp.bfloat16)
            return jax.lax.bitcast_convert_type(normal, jnp.uint16)
        return jax.random.uniform(key, leaf.shape, jnp.float32, 8.0, 14.0).astype(leaf.dtype)

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    del leaves
    keys = jax.random.split(jax.random.key(0), len(shapes))
    pages, exact_keys, exact_values = tree.unflatten([fill(k, s) for k, s in zip(keys, shapes, strict=True)])
    full = jnp.full(rows, length, jnp.int32)
    return dataclasses.replace(
        cache, pages=pages, exact_keys=exact_keys, exact_values=exact_values, length=full,
        compressed=full - spec.sinks - spec.ring,
    )  # fmt: skip


def kernels_by_name(function, *arguments, iterations: int = 7) -> dict[str, float]:
    """Median microseconds of each kernel of a jitted function, by name without its number."""
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.measure(function, aggregate=False, iterations=iterations)(*arguments)
    sums = []
    for run in runs:
        sums.append({})
        for name, ms in run:
            name = name.rstrip("_0123456789") or name
            sums[-1][name] = sums[-1].get(name, 0.0) + ms * 1e3
    return {name: statistics.median(s.get(name, 0.0) for s in sums) for name in sums[-1]}


def time_attend(results: Results, widths: tuple[float, float], batch: int, seq: int, **options) -> None:
    """Times `attend` at a shape; extra options are those of `attend` besides the label."""
    label = options.pop("label", "attend")
    spec = tq.CacheSpec(
        KV_HEADS, DIM, seq + WINDOW + SINKS, *(tq.QuantizerSpec(DIM, bits) for bits in widths),
        window=WINDOW, sink_tokens=SINKS, page_size=PAGE,
    )  # fmt: skip
    nbytes = batch * (seq * spec.bytes_per_token() + (WINDOW + SINKS) * 4 * DIM * KV_HEADS)
    copies = max(1, min(8, int(np.ceil(ROTATED_BYTES / nbytes))))
    cache = random_cache(spec, copies * batch, seq + WINDOW + SINKS)
    query = jax.random.normal(jax.random.key(1), (batch, 1, Q_HEADS, DIM), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=2)
    def chain(query, cache, calls):
        for i in range(calls):
            rows = np.arange(batch, dtype=np.int32) + batch * (i % copies)
            query = tq.attend(query, cache, implementation="triton", rows=jnp.asarray(rows), **options)
        return query

    names = kernels_by_name(functools.partial(chain, calls=copies), query, cache)
    names = {name: round(us / copies, 2) for name, us in names.items()}
    calls = -(-CHAIN // copies) * copies
    whole = end_to_end(lambda q, c: chain(q, c, calls), query, cache, iterations=5) / calls
    row = {
        "op": label, "impl": "triton", "batch": batch, "seq": seq, "key": f"mse{widths[0]}", "value": f"mse{widths[1]}",
        "us": round(sum(names.values()), 2), "chained_us": round(whole, 2), "kernels": names, "bytes": nbytes,
        "floor_us": round(nbytes / results.data["copy_gbps"] / 1e3, 2),
    }  # fmt: skip
    results.add("rows", row)


def time_xla_prepare(results: Results, batch: int) -> None:
    """The rotation of queries with bias and weight as XLA compiles it, for comparison."""
    quantizer = tq.make_quantizer(tq.QuantizerSpec(DIM, 4))
    query = jax.random.normal(jax.random.key(1), (batch, 1, Q_HEADS, DIM), jnp.bfloat16)
    mean = jnp.ones((batch, KV_HEADS, DIM))

    @jax.jit
    def prepare(query, mean, quantizer):
        group = Q_HEADS // KV_HEADS
        query = query.astype(jnp.float32)
        many = jnp.repeat(mean, group, axis=1)[:, None]
        return jnp.sum(query * many, axis=-1), to_rotated(quantizer, query / many)

    names = kernels_by_name(prepare, query, mean, quantizer)
    names = {name: round(us, 2) for name, us in names.items()}
    results.add("rows", {"op": "prepare", "impl": "xla", "batch": batch, "us": sum(names.values()), "kernels": names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=120, help="seconds")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--parts", default="parity,times")
    options = parser.parse_args()
    results = Results(options.json, options.limit)
    if "times" in options.parts:
        results.data["copy_gbps"] = round(copy_bandwidth(), 1)
        print("copy GB/s", results.data["copy_gbps"], flush=True)
        for shape in SHAPES:
            guarded(results, f"cudnn {shape}", time_cudnn, results, *shape)
            guarded(results, f"attend {shape}", time_attend, results, (4, 4), *shape)
        for batch in (1, 32):
            guarded(results, "prepare", time_xla_prepare, results, batch)
    if "parity" in options.parts:
        check_parity(results)
    results.write()
    failed = [row for row in results.data["parity"] if not row["ok"]]
    print("parity failures:", failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
