"""What the backend says at the start: which layers are compressed, how, and what that saves."""

import dataclasses
from typing import Any

from vllm.logger import init_logger

from interop.vllm.options import Options

logger = init_logger("vllm.tq_jax")  # a child of vLLM's, whose handlers show it

BIASED_KEYS = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl")
"""Model types whose keys have biases without saying so in their configuration."""


def report(vllm_config: Any) -> None:
    """Logs the summary, and a warning for a model that needs statistics and has none; once a process."""
    logger.info_once(summary(vllm_config))
    options, config = Options.from_config(vllm_config.additional_config), vllm_config.model_config.hf_text_config
    biased = getattr(config, "attention_bias", False) or getattr(config, "model_type", "") in BIASED_KEYS
    if biased and options.statistics is None:
        logger.warning_once(
            "tq_jax: keys of this model have a bias, which a rotation cannot repair: expect worse answers than without "
            "compression unless the option statistics names a file of their means (see interop.calibrate)"
        )


def summary(vllm_config: Any) -> str:
    """Which layers are compressed, how, and how many more tokens the same memory holds."""
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
    how = "" if options.statistics is None else f", keys centred and weighted by {options.statistics}"
    return (
        f"tq_jax compresses {len(compressed)} of {len(layers)} layers {compressed} to {options.label} ({content} a "
        f"head and token){how}{others}. The same memory holds {dense / full:.2f} times as many tokens"
    )
