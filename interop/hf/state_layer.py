"""A compressed layer that also holds the state of a state-space model, as layers of Falcon-H1 and Zamba2 do.

transformers 5 has such layers; before, models of this kind made caches of their own.
"""

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import LinearAttentionLayer

from interop.hf.layer import CompressedLayer, Compression, tensor_bytes


class CompressedLayerWithState(LinearAttentionLayer, CompressedLayer):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Keys and values compressed, and states of convolutions and recurrences as transformers has them.

    Args:
        compression: How keys and values are compressed.
        statistics: As for `CompressedLayer`.
        number_of_states: Number of states.
    """

    is_compileable = False  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        compression: Compression,
        statistics: tuple[np.ndarray, np.ndarray] | None = None,
        number_of_states: int = 1,
    ) -> None:
        CompressedLayer.__init__(self, compression, statistics)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *keys_and_values: torch.Tensor, **states: Any) -> None:
        """Notes type and device of keys and values, given by place, or makes room for states, given by name."""
        if keys_and_values:
            CompressedLayer.lazy_initialization(self, *keys_and_values)
        else:
            LinearAttentionLayer.lazy_initialization(self, **states)

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed keys and values and of the states."""
        return CompressedLayer.nbytes.fget(self) + tensor_bytes([self.conv_states, self.recurrent_states])  # pyright: ignore[reportOptionalCall]

    def reset(self) -> None:
        """Empties the layer."""
        CompressedLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues row beam_idx[i]."""
        CompressedLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # pyright: ignore[reportArgumentType]

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the latest tokens, if states of the past are recorded; arguments as for `CompressedLayer.crop`."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        CompressedLayer.crop(self, tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises NotImplementedError: transformers' states have no such operation."""
        raise NotImplementedError(f"a state is not repeated, got batch_repeat_interleave({repeats})")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Raises NotImplementedError: transformers' states have no such operation."""
        raise NotImplementedError(f"rows of a state are not selected, got batch_select_indices({indices.tolist()})")

    def offload(self) -> None:
        """Raises NotImplementedError: the cache stays on its device."""
        CompressedLayer.offload(self)

    prefetch = offload
