"""Blocks of a serving engine in torch memory: as tensors of pages, as rows for kernels, and as bytes for JAX.

`pallas_kernels.blocks` draws a block. Nothing here copies memory.
"""

from typing import Any

import jax
import torch

import tq_jax as tq
from interop.launcher.program import StridedRows
from interop.torch.dlpack import CPU_ALIGNMENT, to_jax
from pallas_kernels.blocks import ArrayPlace, BlockLayout, Blocks, PageRows


class TorchBlocks:
    """The blocks of one layer.

    Attributes:
        layout: What lies where in a block.
        pages: The arrays of `Pages` as views of the memory, block b being page b.

    Args:
        memory: [blocks, h_kv, page_size, n] of any type; n are at least the bytes of a token's key and value. A block
            has no gaps; between blocks may lie other memory.
        key: What keys are stored as.
        value: What values are stored as.

    Raises:
        ValueError: For blocks with gaps or too few bytes, or that do not start where kernels assume.

    Example:
        >>> four = tq.QuantizerSpec(dim=64, bits=4)
        >>> pages = TorchBlocks(torch.zeros(3, 2, 32, 68, dtype=torch.uint8), four, four).pages
        >>> pages.keys.packed.shape, pages.keys.packed.stride(0)
        (torch.Size([3, 2, 32, 32]), 4352)
    """

    def __init__(self, memory: torch.Tensor, key: tq.QuantizerSpec, value: tq.QuantizerSpec) -> None:
        self.layout = BlockLayout(memory.shape[1], memory.shape[2], key.format, value.format)
        needed, given = key.bytes_per_vector + value.bytes_per_vector, memory.shape[3] * memory.itemsize
        if given < needed or not memory[:1].is_contiguous():
            raise ValueError(
                f"expected blocks without gaps of {needed} bytes per head and token, got {given} with strides "
                f"{memory.stride()}"
            )
        self._memory, self._stride = memory, int(memory.stride(0)) * memory.itemsize
        self.layout.require_room(self._stride, memory.data_ptr())
        blocks, size = memory.shape[0], self.layout.page_bytes
        whole = memory.view(torch.uint8)
        content = whole.as_strided((blocks, size), (self._stride, 1), whole.storage_offset())

        def view(place: ArrayPlace) -> torch.Tensor:
            part = content[:, place.start : place.start + place.size]
            return part.view(getattr(torch, place.dtype)).unflatten(1, place.shape)

        self.pages: Any = jax.tree.map(view, self.layout.places)

    def rows(self) -> PageRows:
        """The pages for kernels that torch launches."""
        rows: Any = jax.tree.map(StridedRows, self.pages)
        return PageRows(rows.keys, rows.values, self.layout)

    def as_jax(self) -> Blocks:
        """The bytes on a CPU as JAX sees them, current after every write of torch.

        Raises:
            ValueError: If JAX cannot share the memory.
        """
        whole, stride = self._memory.view(torch.uint8), self._stride
        offset, size = int(whole.storage_offset()), int(whole.untyped_storage().nbytes())
        # Behind the last page may be no whole stride: the array then starts before the first page.
        first = min(offset, size - whole.shape[0] * stride) // CPU_ALIGNMENT * CPU_ALIGNMENT
        start = offset - first
        if first < 0 or start + self.layout.page_bytes > stride:
            raise ValueError(
                f"expected memory of {whole.shape[0]} blocks of {stride} bytes around the pages, got {size} bytes with "
                f"the first page at {offset}"
            )
        rows = whole.as_strided((whole.shape[0], stride), (stride, 1), first)
        shared, first_byte = to_jax((rows, torch.tensor(start, dtype=torch.int32)))
        return Blocks(shared, first_byte, self.layout)
