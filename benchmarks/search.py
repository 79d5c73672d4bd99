"""Queries per second of exhaustive search on codes against full-precision search, on whatever device JAX has.

    python benchmarks/search.py --json search_h100.json

Full precision is `torch` in float16 (matrix product, then top-k) where torch sees a GPU, and jnp in float16 everywhere.
All arrays are on the device; a time is the median of several calls, each waited for.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from tq_jax import search as nearest

K = 10
SIZES = ((100_000, 128), (100_000, 200), (1_000_000, 128), (1_000_000, 200))
QUERIES = (1, 64, 1024)


def median_seconds(call, wait, repeats: int) -> float:
    wait(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def full_jax(x):
    half = x.astype(jnp.float16)
    found = jax.jit(lambda q, x: jax.lax.top_k(jnp.einsum("qi,ni->qn", q, x, preferred_element_type=jnp.float32), K))
    return lambda q: lambda: found(q.astype(jnp.float16), half)


def full_torch(x):
    import torch

    half = torch.from_dlpack(x).half()

    def make(q):
        query = torch.from_dlpack(q).half()
        return lambda: torch.topk(query @ half.T, K)

    return make


def has_torch_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes to run")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows: list[dict] = []
    if has_torch_gpu():
        import torch

    def torch_wait(_):
        torch.cuda.synchronize()

    for count, dim in SIZES[: options.sizes]:
        keys = jax.random.split(jax.random.key(0), 2)
        x, q = (jax.random.normal(key, (n, dim)) for key, n in zip(keys, (count, max(QUERIES)), strict=True))
        peers = {"float16 jnp": (full_jax(x), jax.block_until_ready)}
        if has_torch_gpu():
            peers["float16 torch"] = full_torch(x), torch_wait
        indexes = {}
        for bits in (2, 4):
            start = time.perf_counter()
            index = nearest.build(x, nearest.IndexSpec(dim=dim, bits=bits, basis="random"))
            first = time.perf_counter() - start
            start = time.perf_counter()
            index = jax.block_until_ready(nearest.add(nearest.train(x[:20_000], index.spec, capacity=count), x))
            indexes[f"tq {bits} bits"] = index, first, time.perf_counter() - start
        for queries in QUERIES:
            for name, (make, wait) in peers.items():
                seconds = median_seconds(make(q[:queries]), wait, options.repeats)
                rows.append({"impl": name, "bytes": count * dim * 2})
                finish(rows, count, dim, queries, seconds)
            for name, (index, first, encode) in indexes.items():

                def call(index=index, batch=q[:queries]):
                    return nearest.search(index, batch, K)

                seconds = median_seconds(call, jax.block_until_ready, options.repeats)
                rows.append({"impl": name, "bytes": count * index.bytes_per_vector})
                rows[-1] |= {"encode_first_seconds": first, "encode_seconds": encode}
                finish(rows, count, dim, queries, seconds)
        if options.json:
            options.json.write_text(
                json.dumps(
                    {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "k": K, "rows": rows}, indent=2
                )
                + "\n"
            )


def finish(rows: list[dict], count: int, dim: int, queries: int, seconds: float) -> None:
    row = rows[-1]
    row |= {"vectors": count, "dim": dim, "queries": queries, "seconds": seconds, "qps": queries / seconds}
    extra = f" encode {row['encode_seconds']:.2f} s" if "encode_seconds" in row else ""
    print(f"{count:>8} x {dim} {row['impl']:>14} {queries:>5} queries {row['qps']:>12.0f} q/s{extra}", flush=True)


if __name__ == "__main__":
    main()
