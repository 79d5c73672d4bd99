"""Handles that stand for the keys and values of a compressed layer, and the arguments that change the logits."""

import dataclasses
from typing import Any

import jax
import torch

ATTENTION = "tq_jax"
"""Name of the attention implementation in transformers."""


@dataclasses.dataclass(frozen=True)
class LogitArguments:
    """Arguments of attention that change the logits, by their names in transformers.

    Attributes:
        scaling: Factor of the logits; 1 / sqrt(d) by default.
        softcap: Soft-cap: a logit x becomes softcap * tanh(x / softcap).
        s_aux: Sink logits [h_q].
    """

    scaling: float | None
    softcap: float | None
    s_aux: torch.Tensor | None


class Handle:
    """Stands for all keys (or all values) of a layer, in place of the tensor that `update` returns in other caches.

    A model whose later layers reuse keys and values hands them the handles of the layer that owns these.

    Attributes:
        layer: The `CompressedLayer` that holds the tokens so far.
        tokens: New keys or values [b, h_kv, t, d].
        attends_exactly: Whether the new tokens are a prompt that attends to them before compression.
    """

    def __init__(self, layer: Any, tokens: torch.Tensor) -> None:
        self.layer, self.tokens = layer, tokens
        self.dtype, self.device = tokens.dtype, tokens.device
        self.attends_exactly = layer.attends_exactly
        batch, heads, count, dim = tokens.shape
        self.shape = torch.Size((batch, heads, layer.seen + count, dim))

    @property
    def is_stored(self) -> bool:
        """Whether the layer holds the new tokens already: the layer that owns them has attended."""
        return self.layer.seen == self.shape[2]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Handle":
        """The handle itself on its own device: layers on several devices cannot share one compressed layer.

        Raises:
            NotImplementedError: For another device.
        """
        del non_blocking  # nothing is copied
        if torch.empty(0, device=device).device != self.device:
            raise NotImplementedError(
                f"layers that share keys and values of a TurboQuantCache run on one device, got {device} and "
                f"{self.device} in {self.layer.compression.model}"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("layer", "tokens"):  # while a copy of the handle is made
            raise AttributeError(name)
        raise AttributeError(f"{self._misuse()} (it asked for .{name})")

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(self._misuse())

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handles = [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, Handle)]
        raise TypeError(handles[0]._misuse() if handles else f"{function} of a TurboQuantCache's layer")

    def _misuse(self) -> str:
        return (
            f"expected attn_implementation={ATTENTION!r} with a TurboQuantCache, got another attention function in "
            f"{self.layer.compression.model} (or its attention does not go through transformers' AttentionInterface): "
            "with dense=True the cache gives other attention functions tensors, which saves storage only"
        )
