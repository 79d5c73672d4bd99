"""Caches that torch holds on a GPU, their tokens, and decoding steps: for tests, and for benchmarks that time them."""

from collections.abc import Sequence
from typing import Any

import jax
import torch

import tq_jax as tq
from interop.launcher.cuda_graph import GraphPool
from interop.torch.cache import TorchCache

DIM, KV_HEADS, Q_HEADS = 128, 8, 32
DEVICE = "cuda"
FORMATS = {
    "K4/V4": (tq.QuantizerSpec(DIM, 4, search=True), tq.QuantizerSpec(DIM, 4, search=True)),
    "K3/V3": (tq.QuantizerSpec(DIM, 3), tq.QuantizerSpec(DIM, 3)),
    "prod 3, group 2": (tq.QuantizerSpec(DIM, 3, kind="prod"), tq.QuantizerSpec(DIM, 2, kind="group")),
    "K2.5/V3.5": (tq.QuantizerSpec(DIM, 2.5), tq.QuantizerSpec(DIM, 3.5)),
}
"""Quantizers of keys and values by name."""

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys, values and queries, [rows, count, heads, DIM]."""


def make_spec(name: str, max_tokens: int) -> tq.CacheSpec:
    """The spec of a cache with a named pair of quantizers."""
    return tq.CacheSpec(KV_HEADS, DIM, max_tokens, *FORMATS[name])


def make_tokens(rows: int, count: int, seed: int = 0) -> Tokens:
    """Random keys, values and queries."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(rows, count, heads, DIM, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    return normal(KV_HEADS), normal(KV_HEADS), normal(Q_HEADS)


def filled_cache(
    lengths: Sequence[int], max_tokens: int, name: str = "K4/V4", pool: GraphPool | None = None
) -> tuple[TorchCache, torch.Tensor]:
    """A cache with random tokens in its rows, and one query per row."""
    cache = TorchCache(make_spec(name, max_tokens), len(lengths), device=DEVICE, graph_pool=pool)
    k, v, query = make_tokens(len(lengths), max(lengths))
    cache.append(k, v, query=query, lengths=lengths)
    return cache, query[:, :1].clone()


def decode_step(layers: Sequence[TorchCache], tokens: Tokens) -> torch.Tensor:
    """Appends one token per row to every layer and attends; the output of a layer is the query of the next."""
    k, v, query = tokens
    for cache in layers:
        cache.append(k, v, query=query)
        query = cache.attend(query)
    return query


def capture_step(layers: Sequence[TorchCache], tokens: Tokens) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A decoding step as a CUDA graph, and its output; the step must have run before, which compiles and loads it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_step(layers, tokens)
    return graph, out


def have_same_bytes(caches: Sequence[TorchCache], copies: Sequence[TorchCache]) -> bool:
    """Whether every tensor of the caches equals that of their copies."""
    leaves = [jax.tree.leaves([cache.arrays for cache in some]) for some in (caches, copies)]
    return all(torch.equal(x, y) for x, y in zip(*leaves, strict=True))


def relative_error(found: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of the wanted tensor."""
    return float((found.float() - want.float()).norm() / want.float().norm())


def random_net(**sizes: Any) -> Any:
    """A random Llama of Hugging Face with a vocabulary of 2,048, in bfloat16 on the GPU."""
    import transformers

    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = transformers.LlamaConfig(vocab_size=2048, **sizes)
        net: Any = transformers.LlamaForCausalLM(config)
        return net.to(torch.bfloat16).eval()


def smollm2_net() -> Any:
    """A random Hugging Face model with the shape of SmolLM2-135M and a small vocabulary, in bfloat16."""
    from interop.hf import ATTENTION

    sizes = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, initializer_range=0.08)
    heads = dict(num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    net = random_net(**sizes, **heads, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    net.set_attn_implementation(ATTENTION)
    return net


GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "drawn": {"do_sample": True, "top_k": 50},
}
"""Options of `generate` by name."""


def padded_prompts() -> dict[str, torch.Tensor]:
    """Two prompts of 600 tokens for `smollm2_net`, the second one padded on the left by seven."""
    ids = torch.randint(1, 2048, (2, 600), generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}
