"""Reading a torch-owned cache back into full precision, for attention functions that take tensors."""

from typing import Any

import jax
import numpy as np
import torch

from interop.torch import jax_calls
from pallas_kernels.append.slots import token_in_slot

BLOCK = 512
"""Tokens per row that are decoded at once, in whole pages: bounds the float32 copies, and one size is compiled."""


def read_tokens(
    arrays: Any, lengths: tuple[int, ...], compressed: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens of a cache in the order of their positions.

    Args:
        arrays: Tensors of the cache, a `tq_jax.Cache`.
        lengths: Tokens of each row.
        compressed: Tokens in the pages of each row.
        dtype: Type of the result.

    Returns:
        Keys and values [rows, h_kv, t, d], where t is the longest row; zeros behind the tokens of shorter rows.
    """
    spec, stored = arrays.spec, (arrays.exact_keys, arrays.exact_values)
    shape = (len(lengths), spec.num_kv_heads, max(lengths, default=0), spec.head_dim)
    out = [x.new_zeros(shape, dtype=dtype) for x in stored]
    pages = max(1, BLOCK // spec.page_size)
    for start in range(0, max(compressed, default=0), pages * spec.page_size):
        count = min(pages * spec.page_size, max(compressed) - start)
        place = slice(spec.sinks + start, spec.sinks + start + count)
        for tensor, block in zip(out, _read_block(arrays, start // spec.page_size, pages), strict=True):
            tensor[:, :, place] = block[:, :, :count]
    row, slot, position = _exact(spec, stored[0].shape[2], lengths, compressed)
    for tensor, pool in zip(out, stored, strict=True):
        index = [torch.from_numpy(x).to(pool.device) for x in (row, slot, position)]
        tensor[index[0], :, index[2]] = pool[index[0], :, index[1]].to(dtype)
        for i, length in enumerate(lengths):  # what lies behind a shorter row may be no number
            tensor[i, :, length:] = 0
    return out[0], out[1]


def _exact(
    spec: Any, slots: int, lengths: tuple[int, ...], compressed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, slot and position of every token that is held in full precision, int64 [n] each."""
    slot = np.broadcast_to(np.arange(slots), (len(lengths), slots))
    counters = (np.asarray(x, np.int64)[:, None] for x in (lengths, compressed))
    position, there = token_in_slot(slot, *counters, sink_slots=spec.sinks, slots=slots)
    row, column = np.nonzero(there)
    return row, slot[row, column], position[row, column].astype(np.int64)


def _read_block(arrays: Any, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` pages of every row, from its page `first` on, float32 [rows, h_kv, count * page_size, d].

    Pages behind the row's last one are read as the last one, so that all blocks have one size.
    """
    per_row, rows = arrays.spec.pages_per_row, arrays.length.shape[0]
    page = torch.arange(first, first + count).clamp(max=per_row - 1)
    table = torch.arange(rows)[:, None] * per_row + page
    pages = jax.tree.map(lambda pool: pool[table.flatten().to(pool.device)], arrays.pages)
    known = None if arrays.statistics is None else (arrays.statistics.mean, arrays.statistics.weight)
    return jax_calls.read_packed(pages, (arrays.key_quantizer, arrays.value_quantizer), known, rows=rows)
