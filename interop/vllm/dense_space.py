"""The memory in which prompts that go on find their earlier tokens, shared by all layers."""

import dataclasses
from typing import Any

import torch

LARGEST = 256 * 2**20
"""Bytes of dense keys and values at a time, unless a single KV head of the longest prompt takes more."""


@dataclasses.dataclass(frozen=True)
class DenseSpace:
    """How much memory dense tokens of a layer take, and how a call is cut to fit.

    Attributes:
        heads: KV heads of a layer.
        dim: Channels of a head.
        dtype: Type of the model.
        elements: Numbers of the keys, and of the values, that there is memory for.

    Example:
        >>> space = DenseSpace(heads=8, dim=128, dtype=torch.bfloat16, elements=2**26)
        >>> space.most, space.heads_at_once(65536), space.heads_at_once(65537), space.tokens(4)
        (524288, 8, 4, 131072)
    """

    heads: int
    dim: int
    dtype: torch.dtype
    elements: int

    @classmethod
    def of(cls, vllm_config: Any, heads: int, dim: int, dtype: torch.dtype) -> "DenseSpace":
        """The space for layers of an engine: whole prompts fit, if need be one KV head at a time."""
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        longest = scheduler.max_num_batched_tokens if model is None else model.max_model_len
        all_heads = longest * min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens) * heads * dim
        return cls(heads, dim, dtype, max(longest * dim, min(LARGEST // (2 * dtype.itemsize), all_heads)))

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return 2 * self.elements * self.dtype.itemsize

    @property
    def most(self) -> int:
        """Most tokens of a call."""
        return self.elements // self.dim

    def tokens(self, heads: int) -> int:
        """Tokens of so many KV heads that there is memory for."""
        return self.elements // (heads * self.dim)

    def heads_at_once(self, tokens: int) -> int:
        """KV heads whose tokens fit together: a divisor of their number, so that few functions are compiled."""
        fitting = (n for n in range(self.heads, 0, -1) if not self.heads % n and self.tokens(n) >= tokens)
        return next(fitting, 1)
