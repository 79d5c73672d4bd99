"""Every kernel against the reference on the device that JAX has, twice each: all cases of the tests, and fast.

    python benchmarks/parity.py decode attend prefill encode append --limit 300 --json parity.json

Where there is no GPU the kernels are interpreted, slowly. Results are written after every row. `large` is of pools of
3 GiB against small ones, on a GPU with 16 GB.
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
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from pallas_kernels.attention import decode_attention, prefill_attention
from pallas_kernels.attention.decode import launch_triton
from pallas_kernels.attention.prefill.launch_triton import config_for as prefill_config
from pallas_kernels.encode import encode_pages
from pallas_kernels.pages import Pages
from tests.kernels.cases import encode as encode_cases
from tests.kernels.cases import pages as page_cases
from tests.kernels.cases import whole_cache as cache_cases
from tq_jax.commands.bench.job import Row
from tq_jax.commands.output import environment, write_json

PREFILL_COUNT, PREFILL_TOLERANCE = 24, 2e-3
Check = Callable[[], Row]


def decode(name: str, precise: bool) -> Row:
    """Few queries over pages."""
    variant = page_cases.VARIANTS[name]
    case = page_cases.make_case(variant)
    query, pages, *_ = case.arrays
    formats = case.options["key_format"], case.options["value_format"]
    config = dataclasses.replace(launch_triton.config_for(query.shape, pages, *formats, precise=precise), programs=64)
    run = jax.jit(functools.partial(decode_attention, **case.options, config=config, implementation="triton"))
    return attention(case, run, 1e-4 if precise else page_cases.tolerance(variant))


def prefill(name: str) -> Row:
    """A chunk of queries over pages."""
    case = page_cases.make_case(dataclasses.replace(page_cases.VARIANTS[name], count=PREFILL_COUNT))
    query, pages, *_ = case.arrays
    config = prefill_config(query.shape, pages, case.options["key_format"], case.options["value_format"])
    run = jax.jit(functools.partial(prefill_attention, **case.options, config=config, implementation="triton"))
    return attention(case, run, PREFILL_TOLERANCE)


def attention(case: page_cases.Case, run: Callable, tolerance: float) -> Row:
    """What the two have in common."""
    got, again = run(*case.arrays), run(*case.arrays)
    want = decode_attention(*case.arrays, **case.options, implementation="reference")
    return verdict(page_cases.relative_error(got, want), tolerance, same=bool(jnp.array_equal(got.acc, again.acc)))


def attend(name: str, precise: bool) -> Row:
    """Attention over a whole cache."""
    case = cache_cases.CASES[name]
    run, query, cache = cache_cases.attend_case(case)
    got, again = (run(query, cache, implementation="triton", precise=precise) for _ in range(2))
    want = run(query, cache, implementation="reference")
    tolerance = case.tolerance(precise=precise)
    return verdict(cache_cases.relative_error(got, want), tolerance, same=bool(jnp.array_equal(got, again)))


def encode(name: str) -> Row:
    """Tokens into pages; differences must be ties of float32 rounding, and few."""
    arrays = encode_cases.make_arrays(encode_cases.CASES[name])
    got, again, want = (
        jax.jit(functools.partial(encode_pages, **arrays.options, implementation=implementation))(
            arrays.keys, arrays.values, arrays.pages, arrays.slots
        )
        for implementation in ("triton", "triton", "reference")
    )
    found = encode_cases.compare(arrays, got, want)
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True))
    ok = same and not found.wrong and found.ties <= max(2, 1e-4 * found.values)
    return dataclasses.asdict(found) | {"wrong": found.wrong[:3], "same_twice": same, "ok": ok}


FOUR = tq.QuantizerSpec(128, 4, search=True)
PROD, GROUP = tq.QuantizerSpec(128, 3, kind="prod"), tq.QuantizerSpec(128, 2, kind="group")
APPENDS = {
    "k4v4": tq.CacheSpec(2, 128, 400, FOUR, FOUR, window=40, page_size=64),
    "k4v4 float32, no window": tq.CacheSpec(2, 128, 400, FOUR, FOUR, window=0, sink_tokens=0, dtype="float32"),
    "prod3 group2": tq.CacheSpec(2, 128, 400, PROD, GROUP, window=130, page_size=64),
    "full precision": tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=128, max_tokens=400),
}
CHUNKS = [[1] * 3] * 3 + [[7, 3, 8]] * 7 + [[90, 1, 0], [1, 0, 1], [200, 150, 3], [8, 8, 8], [200, 200, 1]]
"""Tokens of three rows, appended one after the other: the first ones fix statistics, the last ones do not fit."""


def append(name: str) -> Row:
    """Chunks into some rows of a cache: counters and full-precision tokens alike, statistics to rounding.

    The error is the share of bytes that differ: statistics that are rounded otherwise move keys over thresholds.
    """
    found = again = want = tq.init_cache(APPENDS[name], 4)
    run = {how: jax.jit(functools.partial(tq.append, implementation=how)) for how in ("reference", "triton")}
    rows = jnp.asarray([3, 0, 1], jnp.int32)
    for seed, counts in enumerate(CHUNKS):
        shape = (5, 3, max(counts), 2, 128)
        k, v, *query = jax.random.normal(jax.random.key(seed), shape, APPENDS[name].dtype) + seed % 3
        options = {"query": jnp.concatenate(query, 2), "lengths": jnp.asarray(counts, jnp.int32), "rows": rows}
        want, found, again = (
            run[how](cache, k, v, **options)
            for how, cache in (("reference", want), ("triton", found), ("triton", again))
        )
    close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), found.statistics, want.statistics)
    exact = ("length", "compressed", "overflow", "exact_keys", "exact_values")
    alike = all(bool(jnp.array_equal(getattr(found, name), getattr(want, name))) for name in exact)
    pairs = list(zip(jax.tree.leaves(found.pages), jax.tree.leaves(want.pages), strict=True))
    packed = [(a, b) for a, b in pairs if a.dtype == jnp.uint8]
    share = max((float(jnp.mean((a != b).astype(jnp.float32))) for a, b in packed), default=0.0)
    twice = zip(jax.tree.leaves(found.pages), jax.tree.leaves(again.pages), strict=True)
    same = all(bool(jnp.array_equal(a, b, equal_nan=True)) for a, b in twice)
    row = verdict(share, 2e-3, same=same)
    return row | {"statistics": all(jax.tree.leaves(close)), "ok": row["ok"] and alike and all(jax.tree.leaves(close))}


LARGE_POOL = 3 << 30
"""Bytes of a pool of packed keys that takes offsets beyond signed 32 bits."""


def in_large_pools(pages: Pages) -> tuple[Pages, int]:
    """Pages behind so many others that a pool of keys is large; and how many others."""
    pool = pages.keys.packed
    before = LARGE_POOL // (pool.nbytes // pool.shape[0])
    return jax.tree.map(lambda x: jnp.pad(x, ((before, 0), *((0, 0),) * (x.ndim - 1))), pages), before


def large_attention(name: str, count: int) -> Row:
    """Attention over pages of large pools against the same over small ones, bit for bit."""
    case = page_cases.make_case(dataclasses.replace(page_cases.VARIANTS[name], count=count))
    query, pages, table, *others = case.arrays
    attend = decode_attention if count == 1 else prefill_attention
    run = jax.jit(functools.partial(attend, **case.options, implementation="triton"))
    want = run(*case.arrays)
    larger, before = in_large_pools(pages)
    got = run(query, larger, table + before, *others)
    return verdict(page_cases.relative_error(got, want), 0.0, same=bool(jnp.array_equal(got.acc, want.acc)))


def large_encode(name: str) -> Row:
    """Tokens into pages of large pools against the same into small ones, byte for byte."""
    arrays = encode_cases.make_arrays(encode_cases.CASES[name])
    run = jax.jit(functools.partial(encode_pages, **arrays.options, implementation="triton"))
    want = run(arrays.keys, arrays.values, arrays.pages, arrays.slots)
    larger, before = in_large_pools(arrays.pages)
    moved = before * arrays.pages.keys.packed.shape[2]
    got = run(arrays.keys, arrays.values, larger, jnp.where(arrays.slots < 0, arrays.slots, arrays.slots + moved))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    same = all(bool(jnp.array_equal(a[before:], b, equal_nan=True)) for a, b in pairs)
    return verdict(0.0 if same else 1.0, 0.0, same=same)


def verdict(error: float, tolerance: float, *, same: bool) -> Row:
    """The row of a relative error."""
    return {"error": error, "tolerance": tolerance, "same_twice": same, "ok": same and error <= tolerance}


def checks(ops: list[str]) -> Iterator[tuple[Row, Check]]:
    """Every case of some operations."""
    cases = {"decode": page_cases.VARIANTS, "attend": cache_cases.CASES}
    for op, function in (("decode", decode), ("attend", attend)):
        for name in cases[op] if op in ops else ():
            for precise in (False, True):
                yield {"op": op, "case": name, "precise": precise}, functools.partial(function, name, precise)
    others = (
        ("prefill", prefill, page_cases.VARIANTS),
        ("encode", encode, encode_cases.CASES),
        ("append", append, APPENDS),
    )
    for op, function, names in others:
        for name in names if op in ops else ():
            yield {"op": op, "case": name}, functools.partial(function, name)
    for name in ("k4v4", "k2v2", "prod3 group2") if "large" in ops else ():
        for count in (1, PREFILL_COUNT):
            yield {"op": f"{count} queries", "case": name}, functools.partial(large_attention, name, count)
    for name in ("k4v4", "prod3 group2") if "large" in ops else ():
        yield {"op": "encode", "case": name}, functools.partial(large_encode, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=["decode", "attend", "prefill", "encode", "append"])
    parser.add_argument("--limit", type=float, default=500, help="seconds")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument(
        "--shard", default="0/1", help="I/N: every Nth check from the Ith, for N processes beside each other"
    )
    options = parser.parse_args()
    first, step = map(int, options.shard.split("/"))
    end, data = time.monotonic() + options.limit, environment() | {"rows": []}
    chosen = list(checks(options.ops))[first::step]
    for row, check in chosen:
        if time.monotonic() > end:
            break
        try:
            row |= check()
        except Exception as error:
            traceback.print_exc()
            row |= {"ok": False, "failed": repr(error)[:400]}
        data["rows"].append(row)
        print(json.dumps(row), flush=True)
        write_json(data, options.json)
    failed = [row for row in data["rows"] if not row["ok"]]
    print(
        f"{len(data['rows']) - len(failed)} of {len(data['rows'])} agree, {len(chosen) - len(data['rows'])} not tried"
    )
    for row in failed:
        print("FAILED", json.dumps(row))
    sys.exit(bool(failed) or not data["rows"])


if __name__ == "__main__":
    main()
