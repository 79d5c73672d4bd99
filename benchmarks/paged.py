"""Pages of a serving engine on a GPU: against the reference on the CPU over the same bytes, and the time of a call.

    python benchmarks/paged.py parity [--shard I/N] [--only TEXT]     N processes side by side
    python benchmarks/paged.py time [--only TEXT]

Needs torch, triton and an NVIDIA GPU; no vLLM, and no GPU build of JAX. Lines of JSON; exits 1 if a case fails.
"""

import argparse
import json
import os
import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch

import tq_jax as tq
from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.paged import PagedPool
from interop.vllm.calls import SIZES, plan_calls
from pallas_kernels.attention.decode.launch_triton import MAX_QUERY_TOKENS

LENGTHS, COUNTS = [700, 33, 1, 257, 5], [300, 1, 1, 8, 3]
BLOCKS = 64
DEVICE = "cuda"


def mse(dim, bits, **options):
    return tq.QuantizerSpec(dim, bits, search=True, **options)


def unbiased(dim, bits):
    return mse(dim, bits, scale="unbiased")


PRECISE = AttendOptions(precise=True)
CASES = {  # KV heads, group, page size, keys, values, type, statistics and sinks, options, largest error
    "K4V4": (2, 4, 32, unbiased(128, 4), mse(128, 4), torch.bfloat16, False, PRECISE, 2e-3),
    "K4V4, one byte": (2, 4, 32, unbiased(128, 4), mse(128, 4), torch.bfloat16, False, AttendOptions(), 2e-2),
    "K4V4, statistics, sinks": (3, 3, 64, unbiased(64, 4), mse(64, 4), torch.bfloat16, True, PRECISE, 2e-3),
    "K3V3, window, cap": (
        *(2, 8, 128, unbiased(128, 3), mse(128, 3), torch.float16, False),
        *(AttendOptions(sliding_window=100, softcap=5.0, scale=0.1, precise=True), 2e-3),
    ),
    "K8V4, float32": (1, 4, 32, unbiased(96, 8), mse(96, 4), torch.float32, False, PRECISE, 2e-3),
    "prod, groups": (
        *(2, 2, 64, tq.QuantizerSpec(128, 3, kind="prod"), tq.QuantizerSpec(128, 2, kind="group")),
        *(torch.bfloat16, False, PRECISE, 2e-3),
    ),
}


def parity(name):
    heads, group, page, key, value, dtype, extras, options, limit = CASES[name]
    random = torch.Generator().manual_seed(0)
    dim = key.dim
    table = torch.zeros(len(LENGTHS), -(-max(LENGTHS) // page) + 2, dtype=torch.int32)
    blocks = torch.randperm(BLOCKS - 1, generator=random) + 1
    for row, length in enumerate(LENGTHS):
        used = -(-length // page)
        table[row, :used], blocks = blocks[:used], blocks[used:]
    statistics = sinks = None
    if extras:
        statistics = torch.randn(heads, dim, generator=random) / 2, torch.rand(heads, dim, generator=random) + 0.5
        sinks = torch.randn(heads * group, generator=random)
    content = -(-(key.bytes_per_vector + value.bytes_per_vector) // 2)
    memory = torch.full((BLOCKS, heads, page, content), -1, dtype=torch.int16)  # NaN scales
    quantizers = tq.make_quantizer(key), tq.make_quantizer(value, seed=1)
    pools = {x: PagedPool(memory.to(x, copy=True), *quantizers, dtype, statistics) for x in ("cpu", DEVICE)}
    k, v = (torch.randn(sum(LENGTHS), heads, dim, generator=random).to(dtype) for _ in range(2))
    position = torch.cat([torch.arange(length) for length in LENGTHS])
    request = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    slots = table[request, position // page].long() * page + position % page
    for part in (slice(0, 511), slice(511, None)):
        for device, pool in pools.items():
            pool.write(k[part].to(device), v[part].to(device), slots[part].to(device))
    leaves = [jax.tree.leaves(pools[device].pages) for device in ("cpu", DEVICE)]
    same = [float((a == b.cpu()).float().mean()) for a, b in zip(*leaves, strict=True) if a.dtype == torch.uint8]
    for mine, theirs in zip(*leaves, strict=True):
        mine.copy_(theirs)
    query = torch.randn(sum(COUNTS), heads * group, dim, generator=random).to(dtype)
    lengths, starts = torch.tensor(LENGTHS, dtype=torch.int32), [0, *accumulate(COUNTS)]

    def attend(device):
        output = torch.zeros_like(query, device=device)
        given = None if sinks is None else sinks.to(device)
        for call in plan_calls(starts, lengths.to(device), table.to(device), SIZES[device]):
            call.put(pools[device].attend(call.take(query.to(device)), call.rows, options, given), output)
        return output.cpu()

    expected, found, again = attend("cpu").float(), attend(DEVICE), attend(DEVICE)
    error = float((found.float() - expected).norm() / expected.norm())
    good = error < limit and torch.equal(found, again) and min(same) > 0.98
    row = {"case": name, "error": error, "equal bytes": same, "good": good}
    print(json.dumps(row), flush=True)
    return good


def time_calls(context, batch, chunk):
    """Milliseconds of one layer by CUDA events, host included, the median of 20; pages of 64 tokens, K4/V4."""
    heads, group, page, dim = 8, 4, 64, 128
    quantizers = tq.make_quantizer(unbiased(dim, 4)), tq.make_quantizer(mse(dim, 4), seed=1)
    width = context // page
    memory = torch.zeros(batch * width, heads, page, 132, dtype=torch.uint8, device=DEVICE)
    pool = PagedPool(memory, *quantizers, torch.bfloat16)
    tokens = torch.randn(batch * context, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    pool.write(tokens, tokens, torch.arange(batch * context, device=DEVICE))
    table = torch.randperm(batch * width, device=DEVICE).int().view(batch, width)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    query = torch.randn(batch * chunk, heads * group, dim, device=DEVICE, dtype=torch.bfloat16)
    starts, output = list(range(0, batch * chunk + 1, chunk)), torch.empty_like(query)
    new, slots = tokens[: batch * chunk], torch.arange(batch * chunk, device=DEVICE)

    def plan(sizes=SIZES[DEVICE]):
        return plan_calls(starts, lengths, table, sizes)

    def attend(calls):
        for call in calls:
            call.put(pool.attend(call.take(query), call.rows), output)

    def milliseconds(function):
        times = []
        for _ in range(23):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return float(np.median(times[3:]))

    calls = plan()
    measured = {
        "attend": milliseconds(lambda: attend(calls)),
        "write": milliseconds(lambda: pool.write(new, new, slots)),
        "plan a step": milliseconds(plan),
    }
    if chunk > MAX_QUERY_TOKENS:
        blocks = plan([size for size in SIZES[DEVICE] if size <= MAX_QUERY_TOKENS])
        measured["attend in blocks of few"] = milliseconds(lambda: attend(blocks))
    print(json.dumps({"context": context, "batch": batch, "chunk": chunk, "ms": measured}), flush=True)


SHAPES = {
    "decode 8": (8192, 8, 1),
    "decode 64": (8192, 64, 1),
    "chunk 1024": (8192, 1, 1024),
    "four chunks 200": (8192, 4, 200),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parity", "time"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--only", default="", help="what the name of a case contains")
    given = parser.parse_args()
    if given.what == "time":
        for name, shape in SHAPES.items():
            if given.only in name:
                time_calls(*shape)
        return 0
    index, count = map(int, given.shard.split("/"))
    names = [name for name in CASES if given.only in name]
    good = [parity(name) for name in names[index::count]]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
