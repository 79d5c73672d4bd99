"""Prefill over a compressed prefix on a GPU: time of a chunk of queries against cuDNN's attention over it in bfloat16.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/prefill.py --json prefill.json

Kernel times are CUPTI's, medians, of calls that read other pages each time where the data would fit the L2 cache.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from benchmarks.decode import ROTATED_BYTES, random_pages
from benchmarks.variants import VARIANTS, make_case, relative_error
from pallas_kernels.decode import LogitOptions, decode_attention
from pallas_kernels.prefill import PrefillConfig, prefill_attention

SHAPES = ((1, 32768), (4, 32768))
Q_HEADS, KV_HEADS, DIM, PAGE, CHUNK = 32, 8, 128, 256, 256
WIDTHS = ((4, 4), (3, 3), (2, 2))
PEAK_FLOPS = 989e12
"""Dense bfloat16 operations a second of an H100's datasheet."""

Row = dict[str, Any]


def kernel_times(function: Callable, *arguments: Any, iterations: int = 5) -> tuple[float, dict[str, float]]:
    """Median microseconds of all kernels of a jitted call, and of each in the last call."""
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.measure(function, aggregate=False, iterations=iterations)(*arguments)
    assert runs is not None
    names: dict[str, float] = {}
    for name, ms in runs[-1]:
        names[name] = round(names.get(name, 0.0) + ms * 1e3, 2)
    return statistics.median(sum(ms for _, ms in run) for run in runs) * 1e3, names


def operations(batch: int, seq: int, chunk: int) -> float:
    """Multiplications and additions of both products."""
    return 4.0 * batch * chunk * seq * Q_HEADS * DIM


def _row(impl: str, batch: int, seq: int, chunk: int, us: float, **more: Any) -> Row:
    floor = operations(batch, seq, chunk) / PEAK_FLOPS * 1e6
    return {
        "op": "prefill", "impl": impl, "batch": batch, "seq": seq, "chunk": chunk, "q_heads": Q_HEADS,
        "kv_heads": KV_HEADS, "head_dim": DIM, "us": round(us, 2), "floor_us": round(floor, 2),
        "tflops": round(operations(batch, seq, chunk) / us / 1e6, 1), **more,
    }  # fmt: skip


def time_prefill(
    widths: tuple[int, int], batch: int, seq: int, *, chunk: int = CHUNK, config: PrefillConfig | None = None
) -> Row:
    """The kernel on pages in random order."""
    key, value = (tq.QuantizerSpec(DIM, bits).format for bits in widths)
    nbytes = batch * seq * KV_HEADS * (key.bytes_per_vector + value.bytes_per_vector)
    copies = max(1, min(4, int(np.ceil(ROTATED_BYTES / nbytes))))
    pages = random_pages(key, value, copies * batch * seq)
    order = np.random.default_rng(0).permutation(copies * batch * seq // PAGE).astype(np.int32)
    tables = jnp.asarray(order.reshape(copies, batch, seq // PAGE))
    query = jax.random.normal(jax.random.key(1), (batch, chunk, Q_HEADS, DIM))
    lengths = jnp.full(batch, seq, jnp.int32)
    positions = lengths[:, None] + jnp.arange(chunk, dtype=jnp.int32)

    def attend(query, pages, table):
        return prefill_attention(
            query, pages, table, lengths, positions=positions, key_format=key, value_format=value,
            options=LogitOptions(DIM**-0.5), implementation="triton", config=config,
        )  # fmt: skip

    run = jax.jit(lambda query, pages, tables: [attend(query, pages, tables[i]) for i in range(copies)])
    us, names = kernel_times(run, query, pages, tables)
    temporary = None
    if config is None:
        memory = jax.jit(attend).lower(query, pages, tables[0]).compile().memory_analysis()
        temporary = memory and memory.temp_size_in_bytes
    kernel = sum(us for name, us in names.items() if "prefill" in name)
    return _row(
        "triton", batch, seq, chunk, us / copies, kernel_us=round(kernel / copies, 2), key=f"mse{widths[0]}",
        value=f"mse{widths[1]}", paged=True, page_size=PAGE, bytes=nbytes,
        temporary_bytes=temporary, config=config and dataclasses.asdict(config),
    )  # fmt: skip


def time_cudnn(batch: int, seq: int, *, chunk: int = CHUNK) -> Row:
    """cuDNN's attention, through JAX, over contiguous bfloat16 keys and values."""
    shapes = ((batch, chunk, Q_HEADS, DIM), *[(batch, seq, KV_HEADS, DIM)] * 2)
    q, k, v = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes))
    run = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"))
    us, _ = kernel_times(run, q, k, v)
    return _row("cudnn_bf16", batch, seq, chunk, us, bytes=k.nbytes + v.nbytes)


def time_torch(batch: int, seq: int, *, chunk: int = CHUNK) -> Row:
    """cuDNN's attention, through PyTorch."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(batch, Q_HEADS, chunk, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, KV_HEADS, seq, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for i in range(13):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            stop.record()
            torch.cuda.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(stop) * 1e3)
    nbytes = k.nbytes + v.nbytes
    del q, k, v
    torch.cuda.empty_cache()
    return _row("torch_cudnn_bf16", batch, seq, chunk, statistics.median(times), bytes=nbytes)


def rows(shapes=SHAPES, widths=WIDTHS) -> Iterator[Row]:
    """Rows of `tq-jax bench`: for each shape cuDNN and the kernel at every width."""
    for batch, seq in shapes:
        yield time_cudnn(batch, seq)
        for pair in widths:
            yield time_prefill(pair, batch, seq)


def parity(count: int = 9, config: PrefillConfig | None = None, share: str = "0/1") -> Iterator[Row]:
    """Every variant, or the i-th of n shares "i/n" of them, against the reference, with `count` query tokens, twice."""
    first, step = map(int, share.split("/"))
    for name, variant in list(VARIANTS.items())[first::step]:
        row: Row = {"variant": name, "count": count}
        try:
            case = make_case(dataclasses.replace(variant, count=count))
            run = jax.jit(lambda *a: prefill_attention(*a, **case.options, config=config, implementation="triton"))  # noqa: B023
            got, again = run(*case.arrays), run(*case.arrays)
            want = decode_attention(*case.arrays, **case.options, implementation="reference")
            row["error"] = relative_error(got, want)
            row["same_twice"] = bool(jnp.array_equal(got.acc, again.acc))
            row["ok"] = row["same_twice"] and row["error"] <= 2e-3
        except Exception as error:
            traceback.print_exc()
            row |= {"ok": False, "failed": repr(error)[:400]}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--configs", help="also time configurations: rows,tile,num_warps,num_stages,programs;...")
    parser.add_argument("--parts", default="peers,configs,widths,parity")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--count", type=int, default=9, help="query tokens of the parity cases")
    parser.add_argument("--share", default="0/1", help="which share of the parity cases, i/n")
    options = parser.parse_args()
    data: dict[str, Any] = {"device": jax.devices()[0].device_kind, "rows": [], "parity": []}

    def add(kind: str, make: Callable[..., Row], *arguments: Any, **more: Any) -> None:
        try:
            row = make(*arguments, **more)
        except Exception as error:
            traceback.print_exc()
            row = {"failed": f"{arguments} {more}", "error": repr(error)[:300]}
        data[kind].append(row)
        print(kind, json.dumps(row), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(data, indent=1))

    shapes = [shape for shape in SHAPES if str(shape[0]) in options.batches.split(",")]
    for shape in shapes:
        if "peers" in options.parts:
            add("rows", time_cudnn, *shape)
            add("rows", time_torch, *shape)
        for text in (options.configs or "").split(";") if "configs" in options.parts and options.configs else ():
            add("rows", time_prefill, (4, 4), *shape, config=PrefillConfig(*map(int, text.split(","))))
        for pair in WIDTHS if "widths" in options.parts else ():
            add("rows", time_prefill, pair, *shape)
    for row in parity(options.count, share=options.share) if "parity" in options.parts else ():
        add("parity", lambda row=row: row)
    failed = [row for row in data["parity"] if not row["ok"]]
    print("parity failures:", failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
