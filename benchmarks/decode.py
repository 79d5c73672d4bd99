"""Decode attention on a GPU: parity of every variant with the reference, and time against the memory floor and cuDNN.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/decode.py --limit 500 --json decode.json

Kernel times are CUPTI's, of calls that read other pages each time where the data would fit the L2 cache; end-to-end
times are those of a loop of jitted calls. Results are written after every row: nothing is lost when time runs out.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from benchmarks.variants import VARIANTS, make_case, relative_error, tolerance
from pallas_kernels.decode import LogitOptions, TileConfig, decode_attention, triton
from pallas_kernels.decode.config import default_config
from pallas_kernels.decode.pages import empty_pages

SHAPES = ((8, 32768), (32, 8192), (1, 131072), (1, 32768))
Q_HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 256
ROTATED_BYTES = 250e6
WIDTHS = ((4, 4), (2, 2), (3, 3), (8, 4), (4, 2))
CONFIGS = [
    TileConfig(tile=tile, num_warps=warps, num_stages=stages, programs=132 * per_sm)
    for tile, warps, stages, per_sm in (
        (64, 1, 3, 12),
        (64, 1, 2, 12),
        (64, 1, 3, 10),
        (64, 1, 4, 12),
        (64, 1, 3, 24),
        (128, 2, 3, 6),
        (128, 2, 2, 6),
        (128, 1, 2, 8),
        (128, 1, 3, 8),
        (32, 1, 4, 16),
        (64, 2, 3, 8),
        (256, 4, 2, 3),
        (256, 4, 3, 3),
        (256, 2, 2, 4),
        (128, 4, 3, 4),
        (128, 4, 2, 4),
    )
]


class Results:
    """Rows of a JSON file that is rewritten after each."""

    def __init__(self, path: str | None, limit: float):
        self.path, self.end = path, time.monotonic() + limit
        device = jax.devices()[0]
        self.data = {
            "device": device.device_kind,
            "versions": {"jax": jax.__version__},
            "copy_gbps": None,
            "parity": [],
            "rows": [],
        }

    def add(self, kind: str, row: dict) -> None:
        self.data[kind].append(row)
        print(kind, json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        if self.path:
            Path(self.path).write_text(json.dumps(self.data, indent=1))

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end


def kernel_times(function, *arguments, iterations=5) -> tuple[float, float, dict]:
    """Median microseconds of the decode kernels, of everything else in a jitted call, and by name in the last call."""
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.measure(function, aggregate=False, iterations=iterations)(*arguments)
    decode = [sum(ms for name, ms in run if "decode" in name) for run in runs]
    other = [sum(ms for name, ms in run if "decode" not in name) for run in runs]
    names: dict[str, float] = {}
    for name, ms in runs[-1]:
        names[name] = round(names.get(name, 0.0) + ms * 1e3, 2)
    return statistics.median(decode) * 1e3, statistics.median(other) * 1e3, names


def end_to_end(function, *arguments, iterations=20) -> float:
    """Median microseconds a call of a loop of calls."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(iterations):
            out = function(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / iterations * 1e6)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s read plus written by a copy of 1 GB."""
    x = jnp.zeros(2**28, jnp.float32)
    step = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / end_to_end(step, x, iterations=10) / 1e3


def random_pages(key_format, value_format, tokens: int, seed: int = 0):
    """Pools of random bytes and positive scales."""
    shapes = jax.eval_shape(lambda: empty_pages(tokens // PAGE, KV_HEADS, PAGE, key_format, value_format))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def fill(key, leaf):
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(key, leaf.shape, jnp.uint8)
        return jax.random.uniform(key, leaf.shape, jnp.float32, 8.0, 14.0).astype(leaf.dtype)

    filled = [fill(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    return tree.unflatten(filled)


def time_decode(results: Results, widths, batch: int, seq: int, config: TileConfig, floor_gbps: float) -> None:
    key, value = (tq.QuantizerSpec(DIM, bits).format for bits in widths)
    per_token = key.bytes_per_vector + value.bytes_per_vector
    nbytes = batch * seq * KV_HEADS * per_token
    copies = max(1, min(8, int(np.ceil(ROTATED_BYTES / nbytes))))
    pages = random_pages(key, value, copies * batch * seq)
    order = np.random.default_rng(0).permutation(copies * batch * seq // PAGE).astype(np.int32)
    tables = jnp.asarray(order.reshape(copies, batch, seq // PAGE))
    query = jax.random.normal(jax.random.key(1), (batch, 1, Q_HEADS, DIM))
    lengths = jnp.full(batch, seq, jnp.int32)
    positions = lengths[:, None] - 1

    @jax.jit
    def run(query, pages, tables):
        outs = []
        for i in range(copies):
            part = triton.attend_pages(
                query + 0.01 * i, pages, tables[i], lengths, positions=positions, key_format=key, value_format=value,
                options=LogitOptions(DIM**-0.5), logit_bias=None, sketch_query=None, config=config,
            )  # fmt: skip
            outs.append(part.acc)
        return outs

    kernel, other, names = kernel_times(run, query, pages, tables)
    whole = end_to_end(run, query, pages, tables)
    floor = nbytes / floor_gbps / 1e3
    row = {
        "op": "decode", "impl": "triton", "batch": batch, "seq": seq, "q_heads": Q_HEADS, "kv_heads": KV_HEADS,
        "head_dim": DIM, "key": f"mse{widths[0]}", "value": f"mse{widths[1]}", "paged": True, "page_size": PAGE,
        "us": round(kernel / copies, 2), "merge_us": round(other / copies, 2),
        "end_to_end_us": round(whole / copies, 2), "floor_us": round(floor, 2),
        "over_floor": round(kernel / copies / floor, 3), "bytes": nbytes, "config": dataclasses.asdict(config),
        "kernels": names,
    }  # fmt: skip
    results.add("rows", row)


def time_cudnn(results: Results, batch: int, seq: int) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    results.data["versions"]["torch"] = torch.__version__
    q = torch.randn(batch, Q_HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, KV_HEADS, seq, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for name, backend in (("cudnn_bf16", SDPBackend.CUDNN_ATTENTION), ("flash_bf16", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            call = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, enable_gqa=True)
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            times = []
            for _ in range(20):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                stop.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(stop) * 1e3)
        row = {"op": "decode", "impl": name, "batch": batch, "seq": seq, "us": round(statistics.median(times), 2)}
        results.add("rows", row | {"bytes": k.nbytes + v.nbytes})
    del q, k, v, graph
    torch.cuda.empty_cache()


def guarded(results: Results, label: str, function, *arguments) -> None:
    """Runs one measurement; a failure is a row of its own."""
    if results.over:
        return
    try:
        function(*arguments)
    except Exception as error:
        traceback.print_exc()
        results.add("rows", {"failed": label, "error": repr(error)[:400]})


def check_parity(results: Results) -> None:
    for name, variant in VARIANTS.items():
        for precise in (False, True):
            if results.over:
                return
            row = {"variant": name, "precise": precise}
            try:
                case = make_case(variant)
                start = time.perf_counter()
                query, pages, *_ = case.arrays
                config = triton.config_for(
                    query.shape, pages, case.options["key_format"], case.options["value_format"], precise=precise
                )
                config = dataclasses.replace(config, programs=64)
                attend = functools.partial(decode_attention, **case.options, config=config, implementation="triton")
                run = jax.jit(attend)
                got = jax.block_until_ready(run(*case.arrays))
                again = run(*case.arrays)
                row["seconds"] = round(time.perf_counter() - start, 2)
                want = decode_attention(*case.arrays, **case.options, implementation="reference")
                row["error"] = relative_error(got, want)
                row["same_twice"] = bool(jnp.array_equal(got.acc, again.acc))
                row["ok"] = row["same_twice"] and row["error"] <= (1e-4 if precise else tolerance(variant))
            except Exception as error:
                traceback.print_exc()
                row |= {"ok": False, "failed": repr(error)[:400]}
            results.add("parity", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=500, help="seconds")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--parts", default="parity,peers,configs,widths")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many shapes, in order")
    options = parser.parse_args()
    parts = options.parts.split(",")
    results = Results(options.json, options.limit)
    if "parity" in parts:
        check_parity(results)
    bandwidth = copy_bandwidth()
    results.data["copy_gbps"] = round(bandwidth, 1)
    print("copy GB/s", round(bandwidth, 1), flush=True)
    shapes = SHAPES[: options.shapes]
    for shape in shapes if "peers" in parts else ():
        guarded(results, f"peers {shape}", time_cudnn, results, *shape)
    best = [default_config(PAGE), TileConfig(tile=256, num_warps=4, num_stages=3, programs=132 * 3)]
    if "configs" in parts:
        for config in CONFIGS:
            label = f"{config}"
            guarded(results, label, time_decode, results, (4, 4), *SHAPES[0], config, bandwidth)
        timed = [r for r in results.data["rows"] if r.get("impl") == "triton"]
        timed.sort(key=lambda r: r["us"])
        best = [TileConfig(**row["config"]) for row in timed[:3]] or best
    if "widths" in parts:
        for shape in shapes:
            for widths in WIDTHS:
                for config in best:
                    guarded(results, f"{shape} {widths}", time_decode, results, widths, *shape, config, bandwidth)
    results.write()
    failed = [r for r in results.data["parity"] if not r["ok"]]
    print("parity failures:", failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
