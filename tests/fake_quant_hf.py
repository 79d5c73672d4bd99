"""The oracle as a transformers cache: dense tensors, stock attention, the codes and window of the compressed cache."""

import copy

import numpy as np
import torch
from fake_quant import FakeQuantRow
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import tq_jax as tq
from interop.hf import CACHE_ARGUMENT


class FakeQuantLayer(DynamicLayer):
    """A layer that knows its left padding from the start; its first chunk, the prompt, attends to itself exactly."""

    def __init__(self, spec: tq.CacheSpec, pads: list[int], seed: int) -> None:
        super().__init__()
        self.spec, self.pads, self.seed = spec, pads, seed
        self.sequences: list[tuple[int, FakeQuantRow]] = []

    def update(self, key_states, value_states, *args, **kwargs):
        self.is_initialized = True
        first, rows = not self.sequences, key_states.shape[0]
        if first:
            pads = [self.pads[i * len(self.pads) // rows] for i in range(rows)]
            self.sequences = [(pad, FakeQuantRow(self.spec, self.seed)) for pad in pads]
        for (pad, row), k, v in zip(self.sequences, key_states, value_states, strict=True):
            skip = pad if first else 0
            row.append(*(x[:, skip:].transpose(0, 1).numpy() for x in (k, v)))
        if first:
            return key_states, value_states
        return tuple(
            torch.stack([self._dense(pad, getattr(row, name)) for pad, row in self.sequences]) for name in "kv"
        )

    @staticmethod
    def _dense(pad: int, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.pad(tokens, ((pad, 0), (0, 0), (0, 0)))).transpose(0, 1)

    def get_seq_length(self, *args):
        return self.sequences[0][0] + len(self.sequences[0][1].k) if self.sequences else 0

    def crop(self, n):
        length = self.get_seq_length() + n if n <= 0 else n
        for pad, row in self.sequences:
            row.crop(max(length - pad, 0))

    def reorder_cache(self, beam_idx):
        self.sequences = [copy.copy(self.sequences[i]) for i in beam_idx.tolist()]
        self.sequences = [(pad, copy.copy(row)) for pad, row in self.sequences]


def given(cache) -> dict:
    """A cache as an argument of a model or `generate`."""
    return {CACHE_ARGUMENT: cache}


def fake_quant_cache(config, spec: tq.CacheSpec, pads: list[int] | None = None, seed: int = 0) -> DynamicCache:
    """A DynamicCache whose full-attention layers are `FakeQuantLayer`."""
    cache = DynamicCache(config=config)
    cache.layers = [
        FakeQuantLayer(spec, pads or [0], seed) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
