"""The kernels launched by torch on a GPU: parity with JAX, a CUDA graph with other lengths, host time, a whole model.

XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/torch_route.py --json torch_route.json
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

import tq_jax as tq
from interop.hf import ATTENTION, CACHE_ARGUMENT, TurboQuantCache
from interop.hf.decoding_graphs import decoding_graphs
from interop.launcher.cuda_graph import GraphPool
from interop.torch import jax_calls
from interop.torch.attend_on_gpu import AttendOptions, KernelAttention
from interop.torch.cache import TorchCache
from tq_jax.commands.output import environment, write_json

DIM, KV_HEADS, Q_HEADS = 128, 8, 32


def spec(key: tq.QuantizerSpec, value: tq.QuantizerSpec, max_tokens: int) -> tq.CacheSpec:
    return tq.CacheSpec(KV_HEADS, key.dim, max_tokens, key, value)


SPECS = {
    "K4/V4": (tq.QuantizerSpec(DIM, 4, search=True), tq.QuantizerSpec(DIM, 4, search=True)),
    "K3/V3": (tq.QuantizerSpec(DIM, 3), tq.QuantizerSpec(DIM, 3)),
    "prod 3, group 2": (tq.QuantizerSpec(DIM, 3, kind="prod"), tq.QuantizerSpec(DIM, 2, kind="group")),
    "K2.5/V3.5": (tq.QuantizerSpec(DIM, 2.5), tq.QuantizerSpec(DIM, 3.5)),
}


def tokens(rows: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(rows, count, heads, DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (KV_HEADS, KV_HEADS, Q_HEADS)
    ]


def same_bytes(caches: Sequence[TorchCache], copies: Sequence[TorchCache]) -> bool:
    """Whether every tensor of caches is that of their copies."""
    leaves = [jax.tree.leaves([cache.arrays for cache in some]) for some in (caches, copies)]
    return all(bool(torch.equal(x, y)) for x, y in zip(*leaves, strict=True))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def filled(
    name: str, lengths: list[int], max_tokens: int, pool: GraphPool | None = None
) -> tuple[TorchCache, torch.Tensor]:
    cache = TorchCache(spec(*SPECS[name], max_tokens), len(lengths), device="cuda", graph_pool=pool)
    k, v, q = tokens(len(lengths), max(lengths))
    cache.append(k, v, query=q, lengths=lengths)
    return cache, q[:, :1].clone()


def parity(name: str) -> dict:
    """Against JAX's reference over DLPack: one query, several ragged ones with every option, a long chunk."""
    cache, q = filled(name, [900, 1, 517], 1024)
    row: dict[str, Any] = {"case": name}
    want = jax_calls.attend(q, cache.as_jax(), implementation="reference")
    for label, precise in (("plain", False), ("precise", True)):
        found = cache.attend(q, precise=precise)
        row[label] = relative(found, want)
        row[f"{label} twice"] = bool(torch.equal(found, cache.attend(q, precise=precise)))
    row["same as JAX's launch"] = relative(
        cache.attend(q), jax_calls.attend(q, cache.as_jax(), implementation="triton")
    )
    k, v, qs = tokens(3, 5, seed=2)
    cache.append(k, v, query=qs, lengths=[5, 2, 0])
    options = {"sliding_window": 300, "softcap": 4.0, "sink_logits": torch.linspace(-1, 4, Q_HEADS).cuda()}
    counts = torch.tensor([5, 2, 0], dtype=torch.int32, device="cuda")
    want = jax_calls.attend(qs, cache.as_jax(), implementation="reference", lengths=counts, **options)
    row["ragged chunk, options"] = relative(cache.attend(qs, lengths=[5, 2, 0], **options), want)
    k, v, qs = tokens(3, 21, seed=3)
    cache.append(k, v, query=qs)
    want = jax_calls.attend(qs, cache.as_jax(), implementation="reference")
    found = cache.attend(qs)
    row["long chunk"] = relative(found, want)
    row["long chunk twice"] = bool(torch.equal(found, cache.attend(qs)))
    return row


LAYERS = 4


def graph() -> dict:
    """A decode step over several layers, captured once and replayed: appends and attention find lengths on the GPU.

    Lengths differ between rows and pass the ends of pages; eager steps on copies must leave the same bytes.
    """
    caches = [filled("K4/V4", [900, 300], 1280)[0] for _ in range(LAYERS)]
    given = tokens(2, 1, 3)

    def step(layers: Sequence[TorchCache]) -> torch.Tensor:
        k, v, query = given
        for cache in layers:
            cache.append(k, v, query=query)
            query = cache.attend(query)
        return query

    step(caches)  # compiles, and loads what a capture must not
    copies = [cache.fork() for cache in caches]
    step([cache.fork() for cache in copies])
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = step(caches)
    same, changed = [], []
    for seed in range(200):
        for held, new in zip(given, tokens(2, 1, seed), strict=True):
            held.copy_(new)
        before = out.clone()
        for cache in caches:
            cache.advance()
        captured.replay()
        same.append(bool(torch.equal(out, step(copies))))
        changed.append(relative(out, before))
    row = {"case": f"CUDA graph of {LAYERS} layers", "replays": len(same), "as eager": all(same)}
    row["same bytes"] = same_bytes(caches, copies)
    row["counters"] = all(
        a.lengths == b.lengths == tuple(a.arrays.length.tolist()) for a, b in zip(caches, copies, strict=True)
    )
    row["changed by"] = min(changed)
    row["replay us a layer"] = gpu_us(captured.replay) / LAYERS
    row["eager us a layer"] = host_us(lambda: step(copies), 20) / LAYERS
    return row


def extend() -> dict:
    """Tokens of several layers, appended and attended to in one call, a CUDA graph a layer, against two calls.

    Layers share the memory of their graphs; rows are reordered and memory moves on the way.
    """
    pool = GraphPool()
    caches = [filled("K4/V4", [900, 300], 1280, pool)[0] for _ in range(LAYERS)]
    copies = [cache.fork() for cache in caches]
    same, sinks = [], torch.linspace(-1, 4, Q_HEADS).cuda()
    for seed in range(120):
        k, v, query = tokens(2, 1, seed)
        asked, options = query, {"sink_logits": sinks} if seed % 3 == 0 else {}
        for cache, copy in zip(caches, copies, strict=True):
            query = cache.extend(k, v, query, **options)
            copy.append(k, v, query=asked)
            asked = copy.attend(asked, **options)
        same.append(bool(torch.equal(query, asked)))
        for cache in (*caches, *copies):
            if seed == 40:
                cache.reorder([1, 0])
            if seed == 80:
                cache.reserve(1536)
    row: dict[str, Any] = {"case": f"extend, {LAYERS} layers", "tokens": len(same), "as two calls": all(same)}
    row["same bytes"] = same_bytes(caches, copies)
    row["extend us of the host"] = host_us(lambda: caches[0].extend(k, v, query), 20)
    row["two calls"] = host_us(lambda: (copies[0].append(k, v, query=query), copies[0].attend(query)), 20)
    return row


def gpu_us(call: Callable[[], object], count: int = 20) -> float:
    """Time on the GPU of a call, of several in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / count


def host_us(call: Callable[[], object], count: int = 200) -> float:
    """Host time of a call whose work on the GPU is left to queue up, median of several runs."""
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


def overhead() -> dict:
    cache, q = filled("K4/V4", [300], 512)
    attention, options = KernelAttention(cache.arrays), AttendOptions()
    row = {"case": "host time, us"}
    row["attend, three launches"] = host_us(lambda: attention(q, options))
    row["a launch"] = row["attend, three launches"] / 3
    row["TorchCache.attend"] = host_us(lambda: cache.attend(q))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        attention(q, options)
    row["graph replay"] = host_us(captured.replay)
    row["attend by DLPack"] = host_us(lambda: jax_calls.attend(q, cache.as_jax(), implementation="triton"), 30)
    k, v, _ = tokens(1, 1)
    long, _ = filled("K4/V4", [300], 4096)
    row["TorchCache.append, three launches"] = host_us(lambda: long.append(k, v))
    return row


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "drawn": {"do_sample": True, "top_k": 50},
}


def generation() -> dict:
    """Tokens of `generate` from graphs of whole steps and without, of two rows of which one is padded."""
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, initializer_range=0.08, bos_token_id=None, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    net.set_attn_implementation(ATTENTION)
    ids = torch.randint(1, 2048, (2, 600), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    row: dict[str, Any] = {"case": "generate, 30 layers of a SmolLM2 shape"}
    for mode, how in MODES.items():
        found = []
        for graphs in (False, True, False, True):
            cache = TurboQuantCache(config)
            torch.manual_seed(1)
            torch.cuda.synchronize()
            start = time.perf_counter()
            with decoding_graphs(net, cache) if graphs else contextlib.nullcontext():
                tokens = net.generate(ids, attention_mask=mask, max_new_tokens=96, **how, **{CACHE_ARGUMENT: cache})
            found.append((tokens, (time.perf_counter() - start) * 1e3 / 96))
        row[f"{mode}, same tokens"] = all(bool(torch.equal(found[0][0], tokens)) for tokens, _ in found)
        row[f"{mode}, ms a token"], row[f"{mode}, ms a token from graphs"] = found[2][1], found[3][1]
    return row


PEERS = "DynamicCache + SDPA", "DynamicCache + flash SDPA"


def model(batch: int, context: int, layers: int = 8, steps: int = 24, rounds: int = 2) -> dict:
    """Milliseconds a decoded token of a Llama-shaped model, DynamicCache with SDPA against the compressed cache.

    Of one prompt in several rows that go on on their own. Rounds follow one another, and the faster one counts: at few
    rows the host's time is most of it, and hosts need to warm up.
    """
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=1 << 17,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 2048, (1, context), device="cuda")
    row: dict[str, Any] = {"case": f"{layers} layers, {batch} x {context}"}
    logits = {}
    for name in (*PEERS, "TurboQuantCache K4/V4", "TurboQuantCache K4/V4, CUDA graph") * rounds:
        ours = name.startswith("Turbo")
        # What SDPA chooses by itself may plan anew for each length.
        backend = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "flash" in name else contextlib.nullcontext()
        net.set_attn_implementation(ATTENTION if ours else "sdpa")
        with torch.no_grad(), backend:
            cache: Any = TurboQuantCache(config, max_tokens=context + 512) if ours else transformers.DynamicCache()
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = net(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits
            torch.cuda.synchronize()
            figures = {"prefill s": time.perf_counter() - start}
            cache.batch_repeat_interleave(batch)
            with decoding_graphs(net, cache) if "graph" in name else contextlib.nullcontext():
                times = []
                for step in range(steps):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    out = net(ids[:, step : step + 1].expand(batch, 1), **{CACHE_ARGUMENT: cache}).logits
                    torch.cuda.synchronize()
                    times.append((time.perf_counter() - start) * 1e3)
        figures["ms a token"] = statistics.median(times[8:])
        for what, figure in figures.items():
            row[f"{name}, {what}"] = min(figure, row.get(f"{name}, {what}", figure))
        logits[name] = out.float().log_softmax(-1)
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", default=os.environ.get("OUT", ".") + "/torch_route.json")
    parser.add_argument("--only", default="", help="what the name of a job contains, several divided by |")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    jobs = {"overhead": overhead, "graph": graph, "extend": extend, "generate": generation}
    jobs |= {"model 1x32768": lambda: model(1, 32768), "model 16x32768": lambda: model(16, 32768, layers=4)}
    jobs |= {f"parity {name}": (lambda name=name: parity(name)) for name in SPECS}
    for name, job in jobs.items():
        if not any(text in name for text in arguments.only.split("|")):
            continue
        start = time.perf_counter()
        try:
            row = job()
        except Exception as error:
            traceback.print_exc()
            row = {"case": name, "error": f"{type(error).__name__}: {error}"[:400]}
        rows.append(row | {"seconds": time.perf_counter() - start})
        print(json.dumps(rows[-1]), flush=True)
        write_json(environment() | {"rows": rows}, arguments.json)
    sys.exit(not rows or any("error" in row for row in rows))


if __name__ == "__main__":
    main()
