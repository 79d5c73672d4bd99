"""Time of one layer over pages of a serving engine on a GPU, launched by torch, with its time on the host.

    python benchmarks/paged.py --json paged.json

Needs torch, triton and an NVIDIA GPU; no vLLM, and no GPU build of JAX.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch

import tq_jax as tq
from benchmarks import jobs
from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.paged import PagedPool
from interop.torch.paged_rows import PagedRows
from interop.vllm.calls import RowBuffers, UniformCall, split_runs

DEVICE = "cuda"
KV_HEADS, GROUP, PAGE_SIZE, DIM = 8, 4, 64, 128
SHAPES = {"decode 8": (8192, 8), "decode 64": (8192, 64), "one long sequence": (131072, 1)}
"""Tokens of each sequence, and sequences."""


def milliseconds(function: Callable[[], object]) -> float:
    """Time by CUDA events, the host's included: the median of 20 calls."""
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times[3:]))


def time_calls(context: int, batch: int) -> dict[str, Any]:
    """Times of attending with a query per sequence, of writing its token, of reading all tokens as dense ones, and of
    planning a step, with K4/V4."""
    key, value = tq.QuantizerSpec(DIM, 4, search=True, scale="unbiased"), tq.QuantizerSpec(DIM, 4, search=True)
    quantizers = tq.make_quantizer(key), tq.make_quantizer(value, seed=1)
    width = context // PAGE_SIZE
    memory = torch.zeros(batch * width, KV_HEADS, PAGE_SIZE, 132, dtype=torch.uint8, device=DEVICE)
    pool = PagedPool(memory, *quantizers, torch.bfloat16)
    tokens = torch.randn(batch * context, KV_HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
    pool.write(tokens, tokens, torch.arange(batch * context, device=DEVICE))
    table = torch.randperm(batch * width, device=DEVICE).int().view(batch, width)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    query = torch.randn(batch, KV_HEADS * GROUP, DIM, device=DEVICE, dtype=torch.bfloat16)
    new, slots, output = tokens[:batch], torch.arange(batch, device=DEVICE), torch.empty_like(query)
    options, buffers, rows = AttendOptions(), RowBuffers(batch), PagedRows(table, lengths)
    begin, heads = (torch.arange(n, dtype=torch.int32, device=DEVICE) for n in (batch, KV_HEADS))
    dense = torch.empty_like(tokens), torch.empty_like(tokens)

    def plan() -> UniformCall:
        [run], _ = split_runs(list(range(batch + 1)), 1)
        return UniformCall(run, buffers.rows(run, rows))

    call = plan()
    measured = {
        "attend": milliseconds(lambda: call.attend(pool, query, output, options, None)),
        "write": milliseconds(lambda: pool.write(new, new, slots)),
        "dense": milliseconds(lambda: pool.dequantize(rows, begin * context, heads, dense)),
        "plan a step": milliseconds(plan),
    }
    return {"context": context, "batch": batch, "ms": measured}


def main() -> None:
    options = jobs.make_parser(__doc__).parse_args()
    timings = {name: functools.partial(time_calls, *shape) for name, shape in SHAPES.items()}
    sys.exit(not jobs.run(timings, options, device=torch.cuda.get_device_name()))


if __name__ == "__main__":
    main()
