"""Records the queries, keys and values that the attention of a Hugging Face model is given, for research."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NUMBERS = itertools.count()


@dataclasses.dataclass
class Capture:
    """The record: tensors [b, t, h, d] on the CPU by index of the layer, after rotary embedding, in order of time.

    Attributes:
        queries: Queries of each layer.
        keys: Keys of each layer; each token once, when it is new.
        values: Values of each layer, shaped like the keys.
    """

    queries: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    keys: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    values: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes a NumPy archive of arrays q0, k0, v0, q1, ...; bfloat16, which NumPy lacks, becomes float32."""
        parts = {"q": self.queries, "k": self.keys, "v": self.values}
        arrays = {f"{name}{layer}": _numpy(x) for name, layers in parts.items() for layer, x in layers.items()}
        np.savez_compressed(path, allow_pickle=False, **arrays)


@contextlib.contextmanager
def capture(
    model: PreTrainedModel, *, layers: Collection[int] | None = None, max_tokens: int | None = None
) -> Iterator[Capture]:
    """Records the queries, keys and values of a model while it runs in the block; its outputs do not change.

    Args:
        model: Any model whose attention goes through transformers' AttentionInterface.
        layers: Indices of the layers to record; all by default.
        max_tokens: Most tokens to record per layer; all by default.

    Yields:
        The capture, filled as the model runs.

    Raises:
        NotImplementedError: For a model without AttentionInterface, an attention implementation that transformers does
            not know, or several implementations in one model. While the model runs: for attention modules that have no
            layer index or share one (encoders, cross-attention: capture the part of the model that has one attention
            per layer), and if the newest keys are not the last, as in a static cache.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> with capture(model, layers=[1]) as captured:
        ...     _ = model(torch.ones(1, 5, dtype=torch.long))
        >>> captured.keys[1].shape, captured.queries[1].shape
        (torch.Size([1, 5, 2, 8]), torch.Size([1, 5, 4, 8]))
    """
    original = _implementation(model)
    captured, name = Capture(), f"tq_jax_capture_{next(_NUMBERS)}"
    AttentionInterface.register(name, _recording_attention(captured, original, layers, max_tokens))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise NotImplementedError(
                f"expected a model whose attention goes through AttentionInterface, got {type(model).__name__}"
            )
        yield captured
    finally:
        model.set_attn_implementation(original)
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(name, None)


def _recording_attention(
    captured: Capture, original: str, layers: Collection[int] | None, max_tokens: int | None
) -> Callable:
    """An attention function that records its inputs and calls the original implementation."""
    owners: dict[int, torch.nn.Module] = {}

    def record(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layer = _layer(module, owners)
        if layers is None or layer in layers:
            new = query.shape[2]
            _require_newest_last(query, key, args[0] if args else kwargs.get("attention_mask"))
            given = (
                (captured.queries, query),
                (captured.keys, key[:, :, -new:]),
                (captured.values, value[:, :, -new:]),
            )
            for store, tensor in given:
                _keep(store, layer, tensor.detach().transpose(1, 2).cpu(), max_tokens)
        return _attention(module, original)(module, query, key, value, *args, **kwargs)

    return record


def _implementation(model: PreTrainedModel) -> str:
    """The attention implementation of a model; raises NotImplementedError if its parts differ or it is unknown."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = sorted({config._attn_implementation or "eager" for config in configs})
    if len(found) > 1:
        raise NotImplementedError(f"expected one attention implementation in all of the model, got {found}")
    if found[0] != "eager" and found[0] not in ALL_ATTENTION_FUNCTIONS:
        raise NotImplementedError(f"attention implementations of transformers are recorded, got {found[0]!r}")
    return found[0]


def _layer(module: torch.nn.Module, owners: dict[int, torch.nn.Module]) -> int:
    """The layer index of an attention module; raises NotImplementedError if it has none or shares it."""
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise NotImplementedError(f"expected attentions that know their layer_idx, got a {type(module).__name__}")
    owner = owners.setdefault(int(layer), module)
    if owner is not module:
        raise NotImplementedError(
            f"expected one attention per layer, got a {type(owner).__name__} and a {type(module).__name__} "
            f"of layer {layer}"
        )
    return int(layer)


def _require_newest_last(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raises NotImplementedError if no row's newest query sees the last key."""
    if mask is None:  # causal; several queries without a mask are the first tokens
        sees = query.shape[2] in (1, key.shape[2])
    else:
        last = mask[..., -1, -1]
        sees = bool((last if mask.dtype == torch.bool else last == 0).any())
    if not sees:
        raise NotImplementedError("expected the newest keys to be the last, got later ones (a static cache's?)")


def _attention(module: torch.nn.Module, name: str) -> Any:
    """The attention function that a module calls without the capture."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # pyright: ignore[reportAttributeAccessIssue]
    return ALL_ATTENTION_FUNCTIONS[name]


def _keep(store: dict[int, torch.Tensor], layer: int, new: torch.Tensor, most: int | None) -> None:
    """Appends tokens [b, t, h, d] to those of a layer, up to `most` tokens."""
    old = store.get(layer)
    whole = new if old is None else torch.cat([old, new], dim=1)
    store[layer] = whole if most is None else whole[:, :most]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
