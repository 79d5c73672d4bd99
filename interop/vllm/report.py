"""The summary that the backend logs at the start: which layers are compressed, how, and how much that saves."""

import dataclasses
from typing import Any

from vllm.logger import init_logger

from interop.vllm.options import Options

logger = init_logger("vllm.tq_jax")  # a child of vLLM's logger, whose handlers show its messages


def report(vllm_config: Any) -> None:
    """Logs the summary, once per process."""
    logger.info_once(summary(vllm_config))


def summary(vllm_config: Any) -> str:
    """Says which layers are compressed, how, and how many times as many tokens the same memory holds."""
    layers = {
        name: layer
        for name, layer in vllm_config.compilation_config.static_forward_context.items()
        if hasattr(layer, "attn_backend") and hasattr(layer, "get_kv_cache_spec")
    }
    compressed, full, dense = [], 0, 0
    content = ""
    for name, layer in layers.items():
        plain = layer.get_kv_cache_spec(vllm_config)
        if plain is None:
            continue
        plain = dataclasses.replace(plain, page_size_padded=None)
        spec = layer.attn_backend.customize_spec(plain)
        dense += plain.page_size_bytes
        full += spec.page_size_bytes
        if spec != plain:
            compressed.append(getattr(layer.impl, "layer_index", name))
            content = f"{spec.state_content_size_bytes} instead of {plain.state_content_size_bytes} bytes"
    options = Options.from_config(vllm_config.additional_config)
    others = "" if len(compressed) == len(layers) else "; the others stay in full precision"
    centred = any(getattr(layer.impl, "statistics", None) is not None for layer in layers.values())
    how = f", keys centred and weighted by {options.statistics or 'their bias'}" if centred else ""
    return (
        f"tq_jax compresses {len(compressed)} of {len(layers)} layers {compressed} to {options.label} ({content} per "
        f"head and token){how}{others}. The same memory holds {dense / full:.2f} times as many tokens"
    )
