"""Tokens of a serving engine's pages as dense tensors, by kernels that torch launches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import torch
from jaxtyping import Int

import tq_jax as tq
from interop.launcher.program import BoundProgram
from pallas_kernels.blocks import PageRows
from pallas_kernels.dequantize import DequantizeArguments
from pallas_kernels.dequantize.launch_triton import dequantize_pages
from pallas_kernels.pytree import pytree
from tq_jax.dense import reconstruction_matrix


@pytree
class DenseArrays:
    """The arrays of a layer that every call reads; a pytree.

    Attributes:
        pages: Its pages.
        key_matrix: See `DequantizeArguments`.
        value_matrix: See `DequantizeArguments`.
    """

    pages: PageRows
    key_matrix: Any
    value_matrix: Any


class DenseKernels:
    """The kernels of one layer.

    Args:
        pages: The pages, of rows that kernels take.
        key: Quantizer of keys, of JAX arrays.
        value: Quantizer of values.
        tensor: Makes a tensor on the device of the pages of an array; leaves tensors as they are.
    """

    def __init__(self, pages: PageRows, key: tq.Quantizer, value: tq.Quantizer, tensor: Callable[[Any], Any]) -> None:
        self._formats = key.spec, value.spec
        arrays = DenseArrays(pages, *map(_matrix, (key, value)))
        self._arrays = jax.tree.map(tensor, arrays)
        self._programs: dict[tuple[int, str], BoundProgram] = {}

    def __call__(
        self,
        table: Int[torch.Tensor, "b n"],
        lengths: Int[torch.Tensor, "b"],
        starts: Int[torch.Tensor, "b"],
        heads: Int[torch.Tensor, "h"],
        statistics: tuple[torch.Tensor, ...] | None,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Writes the tokens of sequences; arguments as of `PagedPool.dequantize`, the statistics' [b, h_kv, d]."""
        key = out[0].shape[0], str(out[0].dtype).removeprefix("torch.")
        if key not in self._programs:
            self._programs[key] = BoundProgram(_Dequantize(*self._formats, *key), self._arrays)
        given = (None, None) if statistics is None else statistics
        self._programs[key](table, lengths, starts, heads, *given, out=out)


_matrix = jax.jit(reconstruction_matrix)


@dataclasses.dataclass(frozen=True)
class _Dequantize:
    """`dequantize_pages` as a function of arrays with its static arguments bound."""

    key: tq.QuantizerSpec
    value: tq.QuantizerSpec
    tokens: int
    dtype: str

    def __call__(
        self, x: DenseArrays, table: Any, lengths: Any, starts: Any, heads: Any, mean: Any, weight: Any
    ) -> tuple[Any, Any]:
        formats = self.key.format, self.value.format
        arrays = x.pages, x.key_matrix, x.value_matrix, table, lengths, starts, heads
        arguments = DequantizeArguments(*arrays, *formats, mean=mean, weight=weight)
        return dequantize_pages(arguments, tokens=self.tokens, dtype=self.dtype, interpret=False)
