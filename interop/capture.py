"""Real queries, keys and values of any Hugging Face model, for research: what its attention is given, recorded."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Collection, Iterator
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
    """What was recorded, by layer; tensors [b, t, h, d] on the CPU, after rotary embedding, in the order given.

    Attributes:
        queries: Of each layer.
        keys: Of each layer, new tokens only.
        values: Likewise.
    """

    queries: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    keys: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    values: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes a NumPy archive of arrays q0, k0, v0, q1, ...; bfloat16 as float32, which NumPy has."""
        parts = {"q": self.queries, "k": self.keys, "v": self.values}
        arrays = {f"{name}{layer}": _numpy(x) for name, layers in parts.items() for layer, x in layers.items()}
        np.savez_compressed(path, allow_pickle=False, **arrays)


@contextlib.contextmanager
def capture(
    model: PreTrainedModel, *, layers: Collection[int] | None = None, max_tokens: int | None = None
) -> Iterator[Capture]:
    """Records what the attention of a model is given while it runs, changing nothing of what it computes.

    Args:
        model: Any model whose attention goes through transformers' AttentionInterface.
        layers: Which layers to record; all by default.
        max_tokens: Tokens of a layer to record at most; all by default.

    Yields:
        The capture, filled as the model runs.

    Raises:
        NotImplementedError: For an attention implementation that is not known to transformers.

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
    original = model.config._attn_implementation or "eager"
    if original != "eager" and original not in ALL_ATTENTION_FUNCTIONS:
        raise NotImplementedError(f"attention implementations of transformers are recorded, got {original!r}")
    captured, name = Capture(), f"tq_jax_capture_{next(_NUMBERS)}"

    def record(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layer = int(getattr(module, "layer_idx", 0) or 0)
        if layers is None or layer in layers:
            new = query.shape[2]
            given = (
                (captured.queries, query),
                (captured.keys, key[:, :, -new:]),
                (captured.values, value[:, :, -new:]),
            )
            for store, tensor in given:
                _keep(store, layer, tensor.detach().transpose(1, 2).cpu(), max_tokens)
        return _attention(module, original)(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(name, record)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    model.set_attn_implementation(name)
    try:
        yield captured
    finally:
        model.set_attn_implementation(original)
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(name, None)


def _attention(module: torch.nn.Module, name: str) -> Any:
    """The attention function that a module would have called."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # pyright: ignore[reportAttributeAccessIssue]
    return ALL_ATTENTION_FUNCTIONS[name]


def _keep(store: dict[int, torch.Tensor], layer: int, new: torch.Tensor, most: int | None) -> None:
    """Adds tokens to a layer's, up to the limit."""
    old = store.get(layer)
    whole = new if old is None else torch.cat([old, new], dim=1)
    store[layer] = whole if most is None else whole[:, :most]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
