"""The summary that the backend logs at the start: which layers are compressed, how, and how much that saves."""

import dataclasses
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from interop.vllm.options import Options
from interop.vllm.window import why_off, window_of
from tq_jax.statistics_files import ModelIdentity, identify, missing_statistics

logger = init_logger("vllm.tq_jax")  # a child of vLLM's logger, whose handlers show its messages


def report(vllm_config: Any) -> None:
    """Logs the summary, once per process, and a warning if there are no key statistics."""
    logger.info_once(summary(vllm_config))
    if None in _sources(vllm_config):
        logger.warning_once("tq_jax: %s", missing_statistics(identity_of(vllm_config)))


def identity_of(vllm_config: Any) -> ModelIdentity:
    """The model of a configuration, as files of key statistics know it."""
    model = vllm_config.model_config
    return identify(model.model, model.hf_text_config, revision=model.revision)


def _block_bytes(specs: list[Any], cache_config: Any) -> int:
    """Bytes of a block of all layers; layers of several kinds have equal blocks, unless the layout packs blocks."""
    pages = [spec.page_size_bytes for spec in specs]
    packs = (getattr(cache_config, "kv_cache_layout", None) or "").startswith("B")
    return sum(pages) if packs or len(set(map(type, specs))) == 1 else max(pages) * len(pages)


def _sources(vllm_config: Any) -> set[str | None]:
    """Where the statistics of the compressed layers come from; None for layers without statistics."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return {layer.impl.statistics_from for layer in layers if hasattr(getattr(layer, "impl", None), "statistics_from")}


def summary(vllm_config: Any) -> str:
    """Says which layers are compressed and how, what stays exact, what attends to prompts, and how many tokens fit."""
    layers = {
        name: layer
        for name, layer in vllm_config.compilation_config.static_forward_context.items()
        if hasattr(layer, "attn_backend") and hasattr(layer, "get_kv_cache_spec")
    }
    compressed, others, specs, dense, hot = [], {}, [], 0, 0
    states: dict[str, list[int]] = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if name not in layers and hasattr(layer, "get_kv_cache_spec"):
            states.setdefault(type(layer).__name__, []).append(extract_layer_index(name))
    content = prompts = ""
    requests = vllm_config.scheduler_config.max_num_seqs
    for name, layer in layers.items():
        plain = layer.get_kv_cache_spec(vllm_config)
        if plain is None:
            continue
        plain = dataclasses.replace(plain, page_size_padded=None)
        spec = layer.attn_backend.customize_spec(plain)
        dense += plain.page_size_bytes
        specs.append(spec)
        if spec == plain:
            others.setdefault(layer.attn_backend.get_name(), []).append(extract_layer_index(name))
        else:
            compressed.append(extract_layer_index(name))
            attention = layer.impl.prompt_attention
            space = f"{attention.space.nbytes / 2**20:.1f} MiB"
            prompts = f"{attention.name}; earlier tokens of theirs are dense meanwhile, in at most {space}"
            if (window := window_of(vllm_config, plain.block_size)) is not None:
                hot += window.tokens(requests) * plain.page_size_bytes // plain.block_size
            content = f"{spec.state_content_size_bytes} instead of {plain.state_content_size_bytes} bytes"
    options = Options.from_config(vllm_config.additional_config)
    kept = "".join(f"; layers {indices} stay in full precision ({name})" for name, indices in others.items())
    kept += "".join(f"; layers {indices} have a state instead ({name})" for name, indices in states.items())
    sources = sorted(source for source in _sources(vllm_config) if source is not None)
    how = f", keys centred and weighted by {' and '.join(sources)}" if sources else ""
    return (
        f"tq_jax compresses {len(compressed)} of {len(layers)} layers {compressed} to {options.label} ({content} per "
        f"head and token){how}{kept}. {_kept_tokens(vllm_config, options, hot)}"
        f"Prompts attend within their chunks by {prompts}. "
        f"The same memory holds {dense / _block_bytes(specs, vllm_config.cache_config):.2f} times as many tokens"
    )


def _kept_tokens(vllm_config: Any, options: Options, size: int) -> str:
    """The sentence about the latest and the first tokens, whose hot pools have so many bytes."""
    if not options.window and not options.sinks:
        return ""
    if (reason := why_off(vllm_config)) is not None:
        return f"No tokens stay in full precision as well: {reason}. "
    requests = vllm_config.scheduler_config.max_num_seqs
    return (
        f"Of up to {requests} requests, the latest {options.window} tokens and the first {options.sinks} stay in full "
        f"precision as well, in {size / 2**20:.1f} MiB. "
    )
