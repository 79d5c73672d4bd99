"""Quantizers of a case."""

import dataclasses
from typing import Any

import tq_jax as tq


@dataclasses.dataclass(frozen=True)
class Formats:
    """The stored formats of keys and values.

    Attributes:
        key: Arguments of the keys' quantizer, without dim.
        value: Arguments of the values' quantizer, without dim.
        dim: head_dim.
    """

    key: dict[str, Any] = dataclasses.field(default_factory=lambda: {"bits": 4})
    value: dict[str, Any] = dataclasses.field(default_factory=lambda: {"bits": 4})
    dim: int = 128

    @property
    def specs(self) -> tuple[tq.QuantizerSpec, tq.QuantizerSpec]:
        """Quantizers of keys and of values."""
        return tq.QuantizerSpec(self.dim, **self.key), tq.QuantizerSpec(self.dim, **self.value)
