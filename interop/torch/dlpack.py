"""Pytrees of JAX arrays as pytrees of torch tensors over the same bytes, and back: quantizers, codes, whole caches.

Nothing is copied, on CPU or GPU; a leaf that DLPack cannot share without a copy is refused. A tree keeps its classes:
the torch side of a `Cache` is a `Cache` whose leaves are tensors. JAX holds full-precision tokens of bfloat16 as their
bits in uint16; on the torch side they are bfloat16.

Ownership. Both sides own the memory together: it lives until both have dropped it. Only one side may write it:

* Memory that torch allocated is written by torch, in place, and read by JAX. On the CPU an imported array sees later
  writes; donating it to a jitted function does not free it and does not update it in place (JAX makes a new buffer).
* Memory that JAX allocated must not be written through its torch view: JAX assumes that arrays never change.

Order. JAX runs asynchronously. On the CPU, wait for results before torch overwrites their inputs: `to_torch` of a
result waits, and so does `jax.block_until_ready`. On a GPU an import waits for the work that torch's current stream has
so far, and an export is ordered before what torch launches next. An array that was imported before a write of torch
does not wait for this write, so on a GPU import anew for each call.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.core import Tracer

from tq_jax import Cache

CPU_ALIGNMENT = 64
"""Alignment of XLA's CPU buffers in bytes; torch allocates with this alignment, but a view may start anywhere."""

_WIDE = {
    torch.int64: "int32",
    torch.uint64: "uint32",
    torch.float64: "float32",
    torch.complex128: "complex64",
}
"""Types that JAX copies and narrows unless jax_enable_x64 is set, and the narrower type of each."""


def to_torch(tree: Any) -> Any:
    """The torch view of a pytree of JAX arrays.

    Args:
        tree: JAX arrays in any pytree; `Cache`, `Quantizer` and `Code` are pytrees.

    Returns:
        The same tree with tensors over the same memory. Waits for arrays that are still being computed on a CPU.

    Raises:
        ValueError: For a leaf that is no array, is traced, deleted, or spread over several devices.
        NotImplementedError: For a type that DLPack does not carry, like 4-bit integers (pack them into uint8).

    Example:
        >>> import tq_jax as tq
        >>> q = tq.make_quantizer(tq.QuantizerSpec(dim=64))
        >>> tensors = to_torch(q)
        >>> tensors.rotations[0].dtype, to_jax(tensors).spec == q.spec
        (torch.float32, True)
    """
    exported = jax.tree.map(_export, tree)
    return _map_caches(exported, lambda exact: exact.view(torch.bfloat16))


def to_jax(tree: Any) -> Any:
    """The JAX view of a pytree of torch tensors; inverse of `to_torch`.

    Args:
        tree: Tensors in any pytree. Each tensor is dense (in any order of its axes) and, on a CPU, aligned to 64
            bytes, like every tensor that torch allocates.

    Returns:
        The same tree with JAX arrays over the same memory.

    Raises:
        ValueError: For a leaf that is no tensor, requires a gradient, has gaps, is not aligned, or has a type that JAX
            would narrow.
        NotImplementedError: For a type or device that JAX does not have.
    """
    stored = _map_caches(tree, lambda exact: exact.view(torch.uint16))
    return jax.tree.map(_import, stored)


def _map_caches(tree: Any, view: Any) -> Any:
    """Applies a view to the full-precision tokens of every bfloat16 cache in the tree."""

    def convert(node: Any) -> Any:
        if not isinstance(node, Cache) or node.spec.dtype != "bfloat16":
            return node
        keys, values = (view(x) if isinstance(x, torch.Tensor) else x for x in (node.exact_keys, node.exact_values))
        return dataclasses.replace(node, exact_keys=keys, exact_values=values)

    return jax.tree.map(convert, tree, is_leaf=lambda node: isinstance(node, Cache))


def _export(array: Any) -> torch.Tensor:
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        raise ValueError(f"expected JAX arrays with values, got {_name(array)}")
    if array.is_deleted():
        raise ValueError(f"expected a live array, got a deleted (donated?) one of shape {array.shape}")
    if len(array.devices()) != 1:
        raise ValueError(f"expected arrays on one device, got one on {len(array.devices())}: gather it first")
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise NotImplementedError(f"DLPack carries numbers, got {array.dtype}")
    if jnp.issubdtype(array.dtype, jnp.integer) and jnp.iinfo(array.dtype).bits < 8:
        raise NotImplementedError(f"DLPack carries integers of at least 8 bits, got {array.dtype}: pack them in uint8")
    tensor = torch.from_dlpack(array)
    if array.size and tensor.data_ptr() != array.unsafe_buffer_pointer():
        raise RuntimeError(f"DLPack copied an array of {array.dtype}{list(array.shape)} instead of sharing it")
    return tensor


def _import(tensor: Any) -> jax.Array:
    _require_shareable(tensor)
    try:
        array = jnp.from_dlpack(tensor, copy=False)
    except (jax.errors.JaxRuntimeError, RuntimeError, TypeError, BufferError, ValueError) as error:
        raise NotImplementedError(f"JAX cannot share a tensor of {_name(tensor)}: {error}") from error
    if array.size and array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise RuntimeError(f"DLPack copied a tensor of {_name(tensor)} instead of sharing it")
    return array


def _require_shareable(tensor: Any) -> None:
    """Raises ValueError for a leaf that is no tensor or that JAX would copy, narrow or refuse."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"expected torch tensors, got {_name(tensor)}")
    if tensor.requires_grad:
        raise ValueError(f"expected tensors that need no gradient, got {_name(tensor)}: detach it first")
    if tensor.dtype in _WIDE and not jax.config.read("jax_enable_x64"):
        narrow = _WIDE[tensor.dtype]
        raise ValueError(f"expected a type that JAX keeps, got {_name(tensor)}, which it narrows: convert to {narrow}")
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"expected dense tensors without lazy conjugation, got {_name(tensor)}: make it contiguous")
    if not _is_compact(tensor):
        raise ValueError(
            f"expected a tensor without gaps or overlaps, got {_name(tensor)} with strides {tensor.stride()}: "
            "make it contiguous"
        )
    if tensor.device.type == "cpu" and tensor.numel() and tensor.data_ptr() % CPU_ALIGNMENT:
        raise ValueError(
            f"expected memory aligned to {CPU_ALIGNMENT} bytes, got {_name(tensor)} "
            f"at offset {tensor.data_ptr() % CPU_ALIGNMENT}: clone it"
        )


def _is_compact(tensor: torch.Tensor) -> bool:
    """Whether the strides are those of a dense tensor with its axes in some order."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: (axis[1], axis[0])):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _name(value: Any) -> str:
    if isinstance(value, torch.Tensor | jax.Array):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__
