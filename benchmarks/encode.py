"""The encode kernel on a GPU: parity of every case with the reference, and time against the memory floor.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/encode.py --limit 200 --json encode.json

Times are CUPTI's, of encoding raw bfloat16 vectors (more than the L2 cache holds) into pages. The floor is the time of
copying as many bytes as are read and written. Results are written after every row.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from benchmarks.encode_cases import CASES, compare, make_arrays
from pallas_kernels.decode.pages import empty_pages
from pallas_kernels.encode import TileConfig, encode_pages, triton
from tq_jax.bench import timing
from tq_jax.bench.command import COPY_BYTES
from tq_jax.evaluate.report import environment
from tq_jax.quantizer import encoder

DIM, HEADS, PAGE = 128, 8, 256
CONFIGS = (TileConfig(128, 8), TileConfig(64, 4), TileConfig(64, 8), TileConfig(32, 4), TileConfig(128, 4))


class Results:
    """Rows of a JSON file that is rewritten after each."""

    def __init__(self, path: str | None, limit: float):
        self.path, self.end = path, time.monotonic() + limit
        self.data: dict = environment() | {"copy_gbps": timing.copy_gbps(COPY_BYTES[True]), "parity": [], "rows": []}
        print("copy GB/s", self.data["copy_gbps"], flush=True)

    def add(self, kind: str, row: dict) -> None:
        self.data[kind].append(row)
        print(kind, json.dumps(row), flush=True)
        if self.path:
            Path(self.path).write_text(json.dumps(self.data, indent=1))

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end


def time_encode(
    what: str,
    bits: float,
    *,
    search: bool,
    rows: int,
    tokens: int,
    copy_gbps: float,
    kind: str = "mse",
    config: TileConfig | None = None,
) -> dict:
    """One row: keys (centred, weighted, unbiased scale) or values (least squares) of a number of tokens."""
    keys = what == "key"
    scale = "unbiased" if keys and kind == "mse" else None
    spec = tq.QuantizerSpec(DIM, bits, kind=kind, search=search, scale=scale)
    enc = encoder(tq.make_quantizer(spec))
    count = rows * tokens
    pages = empty_pages(-(-count // PAGE), HEADS, PAGE, spec.format, spec.format)
    pool = pages.keys if keys else pages.values
    x = jax.random.normal(jax.random.key(0), (rows, tokens, HEADS, DIM), jnp.bfloat16)
    order = np.random.default_rng(0).permutation(-(-count // PAGE))
    place = np.arange(count)
    slots = jnp.asarray((order[place // PAGE] * PAGE + place % PAGE).reshape(rows, tokens), jnp.int32)
    channels = (rows, HEADS, DIM)
    mean = jax.random.normal(jax.random.key(1), channels) if keys else None
    weight = jnp.exp(jax.random.normal(jax.random.key(2), channels)) if keys else None

    # Not donated here, so that the call can be repeated; the copy of the pool counts as other work.
    @jax.jit
    def run(x, pool, slots, enc, mean, weight):
        return triton.encode_pool(x, pool, slots, enc, mean, weight, channel_major=not keys, config=config)

    start = time.perf_counter()
    jax.block_until_ready(run(x, pool, slots, enc, mean, weight))
    seconds = time.perf_counter() - start
    kernels = timing.kernel_times(lambda: jax.block_until_ready(run(x, pool, slots, enc, mean, weight)), 1)
    us = sum(t for name, t in kernels.items() if "encode" in name)
    other = sum(kernels.values()) - us
    nbytes = count * HEADS * (2 * DIM + spec.bytes_per_vector)
    floor = nbytes / copy_gbps / 1e3
    return {
        "op": "encode", "impl": "triton", "what": what, what: f"{kind}{bits}", "search": search, "batch": rows,
        "seq": tokens, "kv_heads": HEADS, "head_dim": DIM, "us": round(us, 2), "floor_us": round(floor, 2),
        "over_floor": round(us / floor, 2), "bytes": nbytes, "other_us": round(other, 2),
        "first_call_s": round(seconds, 2), "config": dataclasses.asdict(config) if config else None,
    }  # fmt: skip


LARGE = dict(rows=1, tokens=131072)
STEP = dict(rows=32, tokens=1)


def rows(
    copy_gbps: float, *, widths: Sequence[float] = (4, 3, 2, 8), configs: Sequence[TileConfig | None] = (None,)
) -> Iterator[dict]:
    """Rows of the benchmark's report, one after the other; a failure is a row with "failed"."""
    jobs = [("value", 4, False, LARGE, config) for config in configs if config is not None]
    jobs += [("key", 4, False, LARGE, config) for config in configs if config is not None]
    for search in (False, True):
        for bits in widths:
            jobs += [(what, bits, search, LARGE, None) for what in ("value", "key")]
    jobs += [(what, 4, search, STEP, None) for search in (False, True) for what in ("value", "key")]
    for what, bits, search, shape, config in jobs:
        try:
            yield time_encode(what, bits, search=search, copy_gbps=copy_gbps, config=config, **shape)
        except Exception as error:
            traceback.print_exc()
            yield {"failed": f"{what} {bits} search={search} {shape} {config}", "error": repr(error)[:400]}


def check_parity(results: Results, names: Sequence[str]) -> None:
    for name in names:
        if results.over:
            return
        row: dict = {"case": name}
        try:
            arrays = make_arrays(CASES[name])
            start = time.perf_counter()
            pools = []
            for implementation in ("triton", "triton", "reference"):
                call = functools.partial(encode_pages, **arrays.options, implementation=implementation)
                compiled = jax.jit(call)
                pools.append(jax.block_until_ready(compiled(arrays.keys, arrays.values, arrays.pages, arrays.slots)))
            row["seconds"] = round(time.perf_counter() - start, 2)
            found = compare(arrays, pools[0], pools[2])
            same = [np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(p) for p in pools[:2]), strict=True)]
            row |= dataclasses.asdict(found) | {"wrong": found.wrong[:3], "same_twice": all(same)}
            row["ok"] = not found.wrong and all(same) and found.ties <= max(2, 1e-4 * found.values)
        except Exception as error:
            traceback.print_exc()
            row |= {"ok": False, "failed": repr(error)[:400]}
        results.add("parity", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=200, help="seconds")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--parts", default="parity,times,configs")
    parser.add_argument("--cases", default=",".join(CASES), help="cases of the parity check")
    options = parser.parse_args()
    parts = options.parts.split(",")
    results = Results(options.json, options.limit)
    if "times" in parts:
        for row in rows(results.data["copy_gbps"], configs=CONFIGS if "configs" in parts else (None,)):
            results.add("rows", row)
            if results.over:
                break
    if "parity" in parts:
        check_parity(results, options.cases.split(","))
    failed = [row for row in results.data["parity"] if not row["ok"]]
    print("parity failures:", failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
