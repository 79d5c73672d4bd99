"""GGUF files: metadata and dequantized tensors in Hugging Face names and row order."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tq_jax.models.config import DecoderConfig
from tq_jax.models.config_gguf import config_from_gguf
from tq_jax.models.families import FAMILIES, check_tensor_names
from tq_jax.models.tensors import EXPERT, Tensor

_ROPE_FACTORS = "rope_freqs.weight"
_LONGROPE_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file.

    Attributes:
        path: Its path, for messages.
        config: The decoder that it describes.
        metadata: All metadata fields, name to value.
        tensors: The reader's tensors by their GGUF names. Their data stays in the file until it is read.
    """

    path: Path
    config: DecoderConfig
    metadata: dict[str, Any]
    tensors: dict[str, Any]


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file and check that it holds exactly the tensors that its architecture needs.

    Args:
        path: A `.gguf` file.

    Returns:
        The open file.

    Raises:
        FileNotFoundError: If there is no such file.
        NotImplementedError: For an architecture, option or tensor that `Decoder` does not support.
        ValueError: If the file is corrupt or truncated, or lacks fields or tensors.
    """
    import gguf

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: expected a complete GGUF file, got a corrupt or truncated one ({error})") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # The divisors of the rotary frequencies belong to the config, not to the parameters.
    factors = tensors.pop(_ROPE_FACTORS, None)
    pair = [np.asarray(tensors.pop(name).data) for name in _LONGROPE_FACTORS if name in tensors]
    if len(pair) == 1:
        raise ValueError(f"{path}: expected both tensors {' and '.join(_LONGROPE_FACTORS)} or none, got one")
    config = config_from_gguf(
        metadata,
        tied_head="output.weight" not in tensors,
        rope_factors=None if factors is None else np.asarray(factors.data),
        longrope_factors=(pair[0], pair[1]) if pair else None,
    )
    check_tensor_names(path, config, set(tensors), kind="gguf")
    return GgufFile(path=path, config=config, metadata=metadata, tensors=tensors)


def hf_tensors(file: GgufFile) -> dict[str, np.ndarray]:
    """Dequantize every tensor of a file to float32.

    Args:
        file: From `read_gguf`.

    Returns:
        Tensors by their Hugging Face names, with rows in the order of Hugging Face checkpoints.

    Raises:
        NotImplementedError: For a quantization type that the package gguf cannot read.
        ValueError: If a tensor has another shape than the metadata says, or holds values that are not finite.
    """
    config = file.config
    out: dict[str, np.ndarray] = {}
    for tensor in FAMILIES[config.architecture].stored(tied_head=config.tied_head):
        for layer, slots in itertools.groupby(tensor.slots(config), lambda slot: slot.layer):
            names = tensor.gguf_names(layer)
            array = tensor.to_checkpoint([_in_hf_rows(file, tensor, name) for name in names])
            if EXPERT in tensor.hf and array.shape[0] != config.num_experts:
                raise ValueError(f"{file.path}: {names[0]}: expected {config.num_experts} experts, got {array.shape}")
            out |= {slot.name: array if slot.expert is None else array[slot.expert] for slot in slots}
    return out


def _in_hf_rows(file: GgufFile, tensor: Tensor, name: str) -> np.ndarray:
    """A tensor of a file, dequantized, with rows in the order of Hugging Face checkpoints."""
    array = _dequantize(file, name)
    if tensor.gguf_layout == "rope_pairs":
        return split_rope_pairs(array, head_dim=file.config.head_dim)
    return array - np.float32(1) if tensor.gguf_layout == "plus_one" else array


def split_rope_pairs(rows: np.ndarray, *, head_dim: int) -> np.ndarray:
    """Reorder weight rows from interleaved rotary pairs (0, d/2, 1, d/2 + 1, ...) to half-split order.

    GGUF files of the architecture "llama" store the query and key projections in interleaved order. The decoder has
    one rotary layout, half-split, so the order is undone when a file is read.

    Args:
        rows: [heads * head_dim, dim], the weight of a query or key projection.
        head_dim: Channels of one head.

    Returns:
        [heads * head_dim, dim], the same rows in half-split order.

    Raises:
        ValueError: If the number of rows is not a multiple of head_dim.

    Example:
        >>> split_rope_pairs(np.array([[0], [2], [1], [3]]), head_dim=4).ravel().tolist()
        [0, 1, 2, 3]
    """
    if rows.ndim != 2 or rows.shape[0] % head_dim:
        raise ValueError(f"rows: expected [heads * {head_dim}, dim], got {rows.shape}")
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _dequantize(file: GgufFile, name: str) -> np.ndarray:
    """The values of a tensor, float32, in the shape that the metadata says."""
    import gguf

    tensor = file.tensors[name]
    try:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise NotImplementedError(f"{file.path}: {name} has type {tensor.tensor_type.name}: {error}") from error
    array = np.asarray(array, np.float32)
    expected = tuple(reversed(tensor.shape.tolist()))
    if array.shape != expected:
        raise ValueError(f"{file.path}: {name}: expected shape {expected}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{file.path}: {name}: expected finite weights, got inf or nan")
    return array
