"""Time of the kernels that torch launches on a GPU: on the host, from CUDA graphs, and in whole models.

python benchmarks/torch_route.py --json torch_route.json
"""

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import jobs
from interop.hf import ATTENTION, CACHE_ARGUMENT, TurboQuantCache
from interop.hf.decoding_graphs import decoding_graphs
from interop.launcher.cuda_graph import GraphPool
from interop.torch import jax_calls
from interop.torch.attend_on_gpu import AttendOptions, KernelAttention
from tests.gpu import torch_cases as cases

LAYERS = 4


def gpu_us(call: Callable[[], object], count: int = 20) -> float:
    """Microseconds per call on the GPU, of several calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / count


def host_us(call: Callable[[], object], count: int = 200) -> float:
    """Microseconds per call on the host, whose work on the GPU is left to queue up: the median of five runs."""
    call()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def time_host() -> dict[str, Any]:
    """Host time of attention and of appending, by each route."""
    cache, query = cases.filled_cache([300], 512)
    attention, options = KernelAttention(cache.arrays), AttendOptions()
    row = {"attend, three launches": host_us(lambda: attention(query, options))}
    row["a launch"] = row["attend, three launches"] / 3
    row["TorchCache.attend"] = host_us(lambda: cache.attend(query))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        attention(query, options)
    row["graph replay"] = host_us(captured.replay)
    row["attend by DLPack"] = host_us(lambda: jax_calls.attend(query, cache.as_jax(), implementation="triton"), 30)
    k, v, _ = cases.make_tokens(1, 1)
    long, _ = cases.filled_cache([300], 4096)
    row["TorchCache.append, three launches"] = host_us(lambda: long.append(k, v))
    return row


def time_graph() -> dict[str, Any]:
    """A decoding step of several layers, replayed from a CUDA graph and eager."""
    caches = [cases.filled_cache([900, 300], 1280)[0] for _ in range(LAYERS)]
    given = cases.make_tokens(2, 1, 3)
    cases.decode_step(caches, given)
    copies = [cache.fork() for cache in caches]
    graph, _ = cases.capture_step(caches, given)
    return {
        "replay us per layer": gpu_us(graph.replay) / LAYERS,
        "eager us per layer": host_us(lambda: cases.decode_step(copies, given), 20) / LAYERS,
    }


def time_extend() -> dict[str, Any]:
    """Host time per layer of appending and attending in one call, from a CUDA graph, and in two calls."""
    one, two = (cases.filled_cache([900, 300], 1280, pool=GraphPool())[0] for _ in range(2))
    k, v, query = cases.make_tokens(2, 1)
    return {
        "extend us of the host": host_us(lambda: one.extend(k, v, query), 20),
        "two calls": host_us(lambda: (two.append(k, v, query=query), two.attend(query)), 20),
    }


def time_generate() -> dict[str, Any]:
    """Milliseconds per token of `generate` with graphs of whole steps and without, the second run of each."""
    net, row = cases.smollm2_net(), {}
    for mode, how in cases.GENERATION.items():
        for run in ("", " from graphs") * 2:
            cache = TurboQuantCache(net.config)
            torch.manual_seed(1)
            torch.cuda.synchronize()
            start = time.perf_counter()
            with decoding_graphs(net, cache) if run else contextlib.nullcontext():
                net.generate(**cases.padded_prompts(), max_new_tokens=96, **how, **{CACHE_ARGUMENT: cache})
            torch.cuda.synchronize()
            row[f"{mode}, ms per token{run}"] = (time.perf_counter() - start) * 1e3 / 96
    return row


MODES = (
    "DynamicCache + SDPA",
    "DynamicCache + flash SDPA",
    "TurboQuantCache K4/V4",
    "TurboQuantCache K4/V4, CUDA graph",
)


def llama_net(layers: int) -> Any:
    """A random Hugging Face model with the layers of Llama 3 8B and a small vocabulary, in bfloat16."""
    heads = dict(num_attention_heads=cases.Q_HEADS, num_key_value_heads=cases.KV_HEADS, head_dim=cases.DIM)
    sizes = dict(hidden_size=4096, intermediate_size=14336, max_position_embeddings=1 << 17)
    return cases.random_net(**heads, **sizes, num_hidden_layers=layers)


def time_steps(net: Any, ids: torch.Tensor, cache: Any, batch: int, steps: int, *, graphs: bool) -> tuple[Any, Any]:
    """Seconds of the prompt and milliseconds per decoded token, and the last logits."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = net(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits
    torch.cuda.synchronize()
    figures, times = {"prefill s": time.perf_counter() - start}, []
    cache.batch_repeat_interleave(batch)
    with decoding_graphs(net, cache) if graphs else contextlib.nullcontext():
        for step in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = net(ids[:, step : step + 1].expand(batch, 1), **{CACHE_ARGUMENT: cache}).logits
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
    return figures | {"ms per token": statistics.median(times[8:])}, out.float().log_softmax(-1)


def time_model(batch: int, context: int, layers: int = 8, steps: int = 24, rounds: int = 2) -> dict[str, Any]:
    """Milliseconds per decoded token of a Llama-shaped model: DynamicCache with SDPA against the compressed cache.

    One prompt in several rows, which go on by themselves. Rounds follow one another, and the faster one counts: with
    few rows the host's time is most of it, and hosts need to warm up.
    """
    net = llama_net(layers)
    ids = torch.randint(0, 2048, (1, context), device=cases.DEVICE)
    row: dict[str, Any] = {"layers": layers}
    logits = {}
    for name in MODES * rounds:
        ours = name.startswith("Turbo")
        # SDPA that chooses by itself may plan anew for each length.
        backend = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "flash" in name else contextlib.nullcontext()
        net.set_attn_implementation(ATTENTION if ours else "sdpa")
        cache: Any = TurboQuantCache(net.config, max_tokens=context + 512) if ours else transformers.DynamicCache()
        with torch.no_grad(), backend:
            figures, logits[name] = time_steps(net, ids, cache, batch, steps, graphs="graph" in name)
        for what, figure in figures.items():
            row[f"{name}, {what}"] = min(figure, row.get(f"{name}, {what}", figure))
        if ours:
            row["cache GB"] = cache.nbytes / 1e9
        else:
            row["bfloat16 cache GB"] = sum(layer.keys.nbytes * 2 for layer in cache.layers) / 1e9
        del cache
        torch.cuda.empty_cache()
    exact, _, ours, graphed = logits.values()
    row["KL of the last logits"] = float((exact.exp() * (exact - ours)).sum(-1).mean())
    row["the same from the graph"] = bool(torch.equal(ours, graphed))
    return row


JOBS: jobs.Jobs = {
    "host time, us": time_host,
    f"CUDA graph of {LAYERS} layers": time_graph,
    "extend": time_extend,
    "generate, 30 layers of a SmolLM2 shape": time_generate,
    "8 layers, 1 x 32768": functools.partial(time_model, 1, 32768),
    "4 layers, 16 x 32768": functools.partial(time_model, 16, 32768, layers=4),
}


def main() -> None:
    options = jobs.make_parser(__doc__).parse_args()
    jobs.prepare()
    sys.exit(not jobs.run(JOBS, options))


if __name__ == "__main__":
    main()
