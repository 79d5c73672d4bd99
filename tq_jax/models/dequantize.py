"""Weights of quantized Hugging Face checkpoints, dequantized as they are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from tq_jax.models.quantization import Quantization

Read = Callable[[str], np.ndarray]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output channel, of eight, of each four bits of an integer of AWQ's "gemm" packing."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of four bits of MXFP4 (OCP Microscaling Formats, version 1.0)."""

_FP8_SCALES = ("weight_scale_inv", "weight_scale")
_FP8_UNUSED = ("input_scale", "activation_scale")


def dequantized(
    quantization: Quantization, types: Mapping[str, str], read: Read, *, expected: Collection[str]
) -> tuple[dict[str, str], Read]:
    """A checkpoint as if it were not quantized.

    Args:
        quantization: How it is.
        types: Types of its tensors by their names, as safetensors writes them.
        read: Reads a tensor by its name.
        expected: Names of the tensors that the decoder needs.

    Returns:
        Types and a function that reads, as the arguments; dequantized tensors are float32.

    Raises:
        ValueError: If a tensor lacks another one that it needs.
    """
    if quantization.method == "fp8":
        return _with_scales(quantization, types, read)
    if quantization.method == "mxfp4":
        return _joined(types, read, ("_blocks", "_scales"), "", lambda parts: _mxfp4(*parts))
    if quantization.method == "awq":
        names = (".qweight", ".qzeros", ".scales")
        return _joined(types, read, names, ".weight", lambda parts: from_awq(*parts, group=quantization.group_size))
    kept = {name: kind for name, kind in types.items() if not _is_void_bias(name, types, read, expected)}
    names = (".qweight", ".qzeros", ".scales")

    def from_parts(parts: list[Any]) -> np.ndarray:
        how = {"group": quantization.group_size, "zero_offset": quantization.zero_offset}
        return from_gptq(*parts, **how)

    return _joined(kept, read, names, ".weight", from_parts, optional=".g_idx")


def _is_void_bias(name: str, types: Mapping[str, str], read: Read, expected: Collection[str]) -> bool:
    """Whether a tensor is a bias of zeros, as GPTQ files hold them for projections that have none."""
    quantized = name.removesuffix(".bias") + ".qweight" in types
    return name.endswith(".bias") and quantized and name not in expected and not np.any(read(name))


def _joined(
    types: Mapping[str, str],
    read: Read,
    endings: tuple[str, ...],
    whole: str,
    join: Callable[[list[Any]], np.ndarray],
    optional: str | None = None,
) -> tuple[dict[str, str], Read]:
    """A checkpoint in which tensors of several endings make one; `optional` gives None where there is none."""
    stems = [name.removesuffix(endings[0]) for name in types if name.endswith(endings[0])]
    for name in (stem + ending for stem in stems for ending in endings):
        if name not in types:
            raise ValueError(f"expected the tensor {name!r} beside {endings[0]!r}, got none")
    parts = {stem + whole: [stem + ending for ending in endings] for stem in stems}
    options = {} if optional is None else {stem + whole: stem + optional for stem in stems}
    used = {name for names in parts.values() for name in names} | set(options.values())
    left = {name: kind for name, kind in types.items() if name not in used}

    def read_whole(name: str) -> np.ndarray:
        if name not in parts:
            return read(name)
        arrays: list[Any] = [read(part) for part in parts[name]]
        if name in options:
            arrays.append(read(options[name]) if options[name] in types else None)
        try:
            return join(arrays)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return left | dict.fromkeys(parts, "F32"), read_whole


def _with_scales(quantization: Quantization, types: Mapping[str, str], read: Read) -> tuple[dict[str, str], Read]:
    """A checkpoint whose weights of type E4M3 are multiplied by the scales beside them."""
    scales: dict[str, str] = {}
    unused = set()
    for name, kind in types.items():
        if kind == "F8_E4M3" and name.endswith("weight"):
            stem = name.removesuffix("weight")
            found = [stem + ending for ending in _FP8_SCALES if stem + ending in types]
            if not found:
                raise ValueError(f"expected the tensor {stem + _FP8_SCALES[0]!r} beside {name!r}, got none")
            scales[name] = found[0]
            # Scales of activations have no use where activations are not quantized.
            unused |= {stem + ending for ending in _FP8_UNUSED}
    left = {name: kind for name, kind in types.items() if name not in unused and name not in scales.values()}

    def read_scaled(name: str) -> np.ndarray:
        if name not in scales:
            return read(name)
        try:
            return from_fp8(read(name), read(scales[name]), block=quantization.block)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return left | dict.fromkeys(scales, "F32"), read_scaled


def from_fp8(weight: np.ndarray, scale: np.ndarray, *, block: tuple[int, int] | None) -> np.ndarray:
    """Dequantize E4M3.

    Args:
        weight: float8 [outputs, inputs].
        scale: One factor for all of it, one per output ([outputs] or [outputs, 1]), or one per block.
        block: Outputs and inputs of a block; the last ones may be smaller.

    Returns:
        float32 [outputs, inputs].

    Raises:
        ValueError: If the scales have another shape.
    """
    values, scale = weight.astype(np.float32), scale.astype(np.float32)
    outputs, inputs = values.shape
    if scale.size == 1:
        return values * scale.reshape(())
    if block is not None and scale.shape == (-(-outputs // block[0]), -(-inputs // block[1])):
        rows, columns = (np.arange(size) // step for size, step in zip(values.shape, block, strict=True))
        return values * scale[rows][:, columns]
    if scale.shape in ((outputs,), (outputs, 1)):
        return values * scale.reshape(outputs, 1)
    raise ValueError(f"expected one scale, {outputs} or one per block of {block}, got scales of shape {scale.shape}")


def from_awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, *, group: int) -> np.ndarray:
    """Dequantize four bits of AWQ in its "gemm" packing (arXiv:2306.00978).

    Args:
        qweight: int32 [inputs, outputs / 8].
        qzeros: int32 [groups, outputs / 8], zero points.
        scales: [groups, outputs].
        group: Inputs of a group; -1 for all.

    Returns:
        float32 [outputs, inputs].

    Raises:
        ValueError: If the shapes contradict each other.
    """
    inputs, outputs = qweight.shape[0], 8 * qweight.shape[1]
    size = inputs if group == -1 else group
    _require(qzeros=(qzeros, (-(-inputs // size), outputs // 8)), scales=(scales, (-(-inputs // size), outputs)))

    def unpack(packed: np.ndarray) -> np.ndarray:
        out = np.empty((*packed.shape, 8), np.float32)
        out[..., AWQ_ORDER] = _nibbles(packed)
        return out.reshape(packed.shape[0], -1)

    groups = np.arange(inputs) // size
    return ((unpack(qweight) - unpack(qzeros)[groups]) * scales.astype(np.float32)[groups]).T


def from_gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    g_idx: np.ndarray | None,
    *,
    group: int,
    zero_offset: int,
) -> np.ndarray:
    """Dequantize four bits of GPTQ (arXiv:2210.17323).

    Args:
        qweight: int32 [inputs / 8, outputs].
        qzeros: int32 [groups, outputs / 8], zero points less `zero_offset`.
        scales: [groups, outputs].
        g_idx: int32 [inputs], the group of each input; None for consecutive groups.
        group: Inputs of a group; -1 for all.
        zero_offset: 1 for files of the first format, 0 for those of the second.

    Returns:
        float32 [outputs, inputs].

    Raises:
        ValueError: If the shapes contradict each other, or a group does not exist.
    """
    inputs, outputs = 8 * qweight.shape[0], qweight.shape[1]
    count = -(-inputs // (inputs if group == -1 else group))
    groups = np.arange(inputs) // (inputs if group == -1 else group) if g_idx is None else g_idx
    _require(qzeros=(qzeros, (count, outputs // 8)), scales=(scales, (count, outputs)), g_idx=(groups, (inputs,)))
    if groups.min() < 0 or groups.max() >= count:
        raise ValueError(f"expected g_idx from 0 to {count - 1}, got {groups.min()} to {groups.max()}")
    # The offset was subtracted from the packed integers, with borrows; adding it to them undoes just that.
    zeros = _nibbles(qzeros.view(np.uint32) + np.uint32(0x11111111 * zero_offset)).reshape(count, outputs)
    values = np.moveaxis(_nibbles(qweight), 2, 1).reshape(inputs, outputs)
    return ((values - zeros[groups]) * scales.astype(np.float32)[groups]).T


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """The eight times four bits of each integer, the lowest first, float32 [..., 8]."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return (packed.view(np.uint32)[..., None] >> shifts & np.uint32(15)).astype(np.float32)


def _require(**arrays: tuple[np.ndarray, tuple[int, ...]]) -> None:
    for name, (array, shape) in arrays.items():
        if array.shape != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights of experts from MXFP4, in the layout of checkpoints that are not quantized, float32 [e, i, o].

    Args:
        blocks: uint8 [e, o, i / 32, 16], two values per byte, the lower bits first.
        scales: uint8 [e, o, i / 32], exponents of two plus 127.
    """
    _require(blocks=(blocks, (*scales.shape, 16)))
    values = E2M1[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*scales.shape, 32)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:2], -1).swapaxes(1, 2)
