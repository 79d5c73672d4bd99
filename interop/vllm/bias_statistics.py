"""Statistics of keys that have a bias, from a model's weights alone.

A bias gives all keys of a head a common part. This part can be many times larger than the differences between tokens,
and a quantizer would spend its bits on it. Rotary embedding turns the common part with the position, so that its mean
depends on the positions in use, and the remainder is larger in some channels than in others. Mean and channel weights
are found without any text: the model's own projection and rotary embedding are applied to random hidden states, at
positions up to the last that a request can have, with more of them at the start.
"""

import weakref
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from interop.torch.key_statistics import key_statistics
from tq_jax.statistics_files import COMMAND

PROBES = 1024
"""Number of random hidden states."""

BIASED = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl")
"""Model types whose keys have a bias although their configuration does not say so."""


class Owner:
    """Finds the module of a model that owns an attention layer, its projections and its rotary embedding.

    Args:
        impl: Implementation of the layer, while the model is being built. The owner is the first module that registers
            a child with this implementation.
    """

    def __init__(self, impl: Any) -> None:
        self._found: Any = None
        known = weakref.ref(impl)

        def look(module: torch.nn.Module, name: str, child: Any) -> None:
            if self._found is None and getattr(child, "impl", None) is known() is not None:
                self._found = weakref.ref(module)

        self._hook = register_module_module_registration_hook(look)
        weakref.finalize(impl, self._hook.remove)

    def __call__(self) -> torch.nn.Module | None:
        """The owner; call it once the model is built. None if no module was seen."""
        self._hook.remove()
        return None if self._found is None else self._found()


def bias_statistics(
    owner: torch.nn.Module | None, config: Any, *, positions: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and weight of a layer's keys, for the KV heads of this process.

    Args:
        owner: Module that owns the layer; None if it is unknown.
        config: Text configuration of the model.
        positions: Number of positions that a token can have.

    Returns:
        Mean and weight, float32 [h_kv, d] each; None if the keys have no bias.

    Raises:
        ValueError: For keys whose bias cannot be found; the message says how to make a file of statistics.
    """
    parts = [] if owner is None else list(owner.children())
    projection: Any = next((part for part in parts if isinstance(part, QKVParallelLinear)), None)
    if owner is None or projection is None:
        if getattr(config, "attention_bias", False) or getattr(config, "model_type", "") in BIASED:
            raise ValueError(_message("a projection to queries, keys and values", owner))
        return None
    device = next(owner.parameters()).device
    states = torch.randn(PROBES, projection.input_size, generator=torch.Generator().manual_seed(0), device="cpu")
    states[-1] = 0  # projects to the bias itself
    sizes = [heads * projection.head_size for heads in (projection.num_heads, projection.num_kv_heads)]
    with torch.no_grad():
        given = projection(states.to(device, projection.params_dtype))
        out, apart = given if isinstance(given, tuple) else (given, None)  # vLLM's models of transformers return one
        query, key = (out if apart is None else out + apart).split([*sizes, out.shape[-1] - sum(sizes)], dim=-1)[:2]
        if not bool(key[-1].any()):
            return None
        if any("norm" in name for name, _ in owner.named_children()):
            raise ValueError(_message("keys that are not normalized", owner))
        rotary = next((part for part in parts if isinstance(part, RotaryEmbeddingBase)), None)
        if rotary is None and _rotates(config):
            raise ValueError(_message("a rotary embedding", owner))
        if rotary is not None:
            place = positions ** ((torch.arange(PROBES, device=device) + 0.5) / PROBES)
            query, key = rotary(place.long() - 1, query.contiguous(), key.contiguous())
    mean, weight = key_statistics(*(x[:-1].unflatten(-1, (-1, projection.head_size)) for x in (query, key)))
    return torch.from_numpy(mean), torch.from_numpy(weight)


def _rotates(config: Any) -> bool:
    return any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))


def _message(expected: str, owner: Any) -> str:
    return (
        f"expected {expected} beside the attention of a model whose keys have a bias, to centre them by it, got "
        f"{type(owner).__name__}: make a file of statistics with `{COMMAND} MODEL`"
    )
