"""The stored tensors of a decoder family: their names in files, and the parts of parameters that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from tq_jax.models.config import DecoderConfig
from tq_jax.models.rope import partial_order

LAYER, EXPERT = "{layer}", "{expert}"
FileKind = Literal["hf", "gguf"]
GgufLayout = Literal["plain", "rope_pairs", "plus_one"]
HfLayout = Literal["plain", "inputs_first"]
Part = Literal["query", "key", "value", "gate", "up"]

PARTS: dict[Part, tuple[Any, ...]] = {
    # Axes of `Attention.qkv`: KV heads, then the query heads, the key head and the value head of each.
    "query": (slice(None), slice(None, -2)),
    "key": (slice(None), -2),
    "value": (slice(None), -1),
    # The first axis of `GatedMLP.gate_up`, and of one expert's in `Mixture.gate_up`.
    "gate": (0,),
    "up": (1,),
}
"""Where a stored tensor lies in a parameter that joins several."""


@dataclass(frozen=True)
class Slot:
    """A stored tensor of a Hugging Face checkpoint, and where it goes.

    Attributes:
        name: Its name.
        layer: Number of its layer; None if it belongs to no layer.
        expert: Number of its expert; None if it is not that of one expert.
    """

    name: str
    layer: int | None
    expert: int | None


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a family.

    Attributes:
        path: Dotted path of the parameter that it fills, in a block if there is one such tensor per layer.
        hf: Its name in a Hugging Face checkpoint, with `LAYER` for the number of the layer and `EXPERT` for that of the
            expert.
        gguf: Its name in a GGUF file, with `LAYER` for the number of the layer. A file has all experts in one tensor.
            Several names if GGUF files store gate and up apart that a checkpoint joins.
        gguf_layout: "rope_pairs" if GGUF files store its rows permuted for interleaved rotary positions, "plus_one" if
            they store the values plus one.
        parts: The parts of the parameter that it holds, one after the other; empty for the whole parameter.
        hf_layout: "inputs_first" if a checkpoint stores [experts, inputs, outputs], with gate and up in turn.
    """

    path: str
    hf: str
    gguf: str | tuple[str, ...]
    gguf_layout: GgufLayout = "plain"
    parts: tuple[Part, ...] = ()
    hf_layout: HfLayout = "plain"

    @property
    def per_layer(self) -> bool:
        """Whether a file has one such tensor per layer."""
        return LAYER in self.hf

    def slots(self, config: DecoderConfig) -> Iterator[Slot]:
        """Where its tensors of a Hugging Face checkpoint go."""
        for layer in range(config.num_layers) if self.per_layer else (None,):
            for expert in range(config.num_experts) if EXPERT in self.hf else (None,):
                yield Slot(self.hf.format(layer=layer, expert=expert), layer, expert)

    def gguf_names(self, layer: int | None) -> list[str]:
        """Its names in a GGUF file."""
        names = (self.gguf,) if isinstance(self.gguf, str) else self.gguf
        return [name.format(layer=layer) for name in names]

    def names(self, kind: FileKind, config: DecoderConfig) -> list[str]:
        """All its names in the files of a model.

        Args:
            kind: Kind of the files.
            config: The model.
        """
        if kind == "hf":
            return [slot.name for slot in self.slots(config)]
        layers = range(config.num_layers) if self.per_layer else (None,)
        return [name for layer in layers for name in self.gguf_names(layer)]

    def views(self, parameter: Any) -> list[Any]:
        """Its parts of a parameter of one layer or expert: views of a numpy array, slices of a JAX array."""
        return [parameter[PARTS[part]] for part in self.parts] or [parameter]

    def stored_shape(self, parameter: Any) -> tuple[int, ...]:
        """Its shape in a checkpoint, which knows no axes of heads and parts: they have [outputs, inputs] and [outputs].

        Args:
            parameter: An array of the shape of the parameter of one layer or expert.
        """
        shape, is_kernel = parameter.shape, self.path.endswith("kernel")
        if self.hf_layout == "inputs_first":
            return (shape[0], shape[-1], prod(shape[1:-1])) if is_kernel else (shape[0], prod(shape[1:]))
        if not self.parts:
            return shape
        inputs = shape[-1:] if is_kernel else ()
        return sum(view.size for view in self.views(parameter)) // prod(inputs), *inputs

    def fill(self, parameter: np.ndarray, array: np.ndarray, config: DecoderConfig) -> None:
        """Write it into a parameter.

        Args:
            parameter: The parameter of one layer or expert.
            array: The stored tensor, of `stored_shape`.
            config: The model.
        """
        if self.hf_layout == "inputs_first":
            shape = parameter.shape
            parameter[...] = _reversed(array.reshape(shape[0], *reversed(shape[1:])))
            return
        start, views = 0, self.views(parameter)
        for part, view in zip(self.parts or (None,), views, strict=True):
            rows = array.shape[0] if len(views) == 1 else view.size // prod(array.shape[1:])
            values = array[start : start + rows].reshape(view.shape)
            if config.rotary_dim is not None and part in ("query", "key"):
                order = partial_order(head_dim=config.head_dim, rotary_dim=config.rotary_dim)
                values = np.take(values, order, axis=view.ndim - (2 if self.path.endswith("kernel") else 1))
            view[...] = values
            start += rows

    def to_checkpoint(self, arrays: list[np.ndarray]) -> np.ndarray:
        """A tensor of a Hugging Face checkpoint from those of a GGUF file, whose rows are already in its order."""
        if self.hf_layout == "plain":
            return arrays[0]
        # [experts, outputs, inputs] each, or [experts, outputs].
        whole = _reversed(arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1))
        return whole.reshape(*whole.shape[: arrays[0].ndim - 1], -1)


def _reversed(array: np.ndarray) -> np.ndarray:
    """A view with all axes but the first in reversed order."""
    return array.transpose(0, *range(array.ndim - 1, 0, -1))
