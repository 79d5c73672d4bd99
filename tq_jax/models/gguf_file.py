"""GGUF files: metadata and dequantized tensors in Hugging Face names and row order."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tq_jax.models.config import DecoderConfig
from tq_jax.models.config_gguf import config_from_gguf
from tq_jax.models.families import FAMILIES, Tensor

_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file.

    Attributes:
        path: where it lies, for messages.
        config: the decoder it describes.
        metadata: every metadata field.
        tensors: reader tensors by their GGUF name; data stays in the file until read.
    """

    path: Path
    config: DecoderConfig
    metadata: dict[str, Any]
    tensors: dict[str, Any]


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file and check that it holds exactly the tensors its architecture needs.

    Args:
        path: a ``.gguf`` file.

    Raises:
        FileNotFoundError: there is no such file.
        NotImplementedError: an architecture, option or tensor that the decoders here do not have.
        ValueError: the file is corrupt, truncated, or lacks fields or tensors.
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
    # Divisors of rotary frequencies: part of the config, not of the parameters.
    factors = tensors.pop(_ROPE_FACTORS, None)
    config = config_from_gguf(
        metadata,
        tied_head="output.weight" not in tensors,
        rope_factors=None if factors is None else np.asarray(factors.data),
    )
    _check_names(path, config, set(tensors))
    return GgufFile(path=path, config=config, metadata=metadata, tensors=tensors)


def hf_tensors(file: GgufFile) -> dict[str, np.ndarray]:
    """Dequantize every tensor of a file to float32, under its Hugging Face name and in its row order.

    Raises:
        NotImplementedError: a quantization type that ``gguf`` cannot read.
        ValueError: a tensor has another shape than the metadata says, or holds values that are not finite.
    """
    config = file.config
    family = FAMILIES[config.architecture]
    out = {}
    for tensor in family.tensors if config.tied_head else (*family.tensors, family.head):
        for layer in range(config.num_layers if tensor.per_layer else 1):
            array = _dequantize(file, tensor.gguf.format(layer=layer))
            if tensor.gguf_layout == "rope_pairs":
                array = split_rope_pairs(array, head_dim=config.head_dim)
            elif tensor.gguf_layout == "plus_one":
                array = array - np.float32(1)
            out[tensor.hf.format(layer=layer)] = array
    return out


def split_rope_pairs(rows: np.ndarray, *, head_dim: int) -> np.ndarray:
    """Reorder query or key rows from interleaved rotary pairs (0, d/2, 1, d/2 + 1, ...) to half-split order.

    ``llama`` GGUF files store both projections so; undone here, the decoder needs one rotary layout only.

    Args:
        rows: [heads * head_dim, dim].
        head_dim: channels of one head.

    Returns:
        [heads * head_dim, dim].

    Raises:
        ValueError: the rows are no multiple of head_dim.

    Example:
        >>> split_rope_pairs(np.array([[0], [2], [1], [3]]), head_dim=4).ravel().tolist()
        [0, 1, 2, 3]
    """
    if rows.ndim != 2 or rows.shape[0] % head_dim:
        raise ValueError(f"rows: expected [heads * {head_dim}, dim], got {rows.shape}")
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _dequantize(file: GgufFile, name: str) -> np.ndarray:
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


def _check_names(path: Path, config: DecoderConfig, found: set[str]) -> None:
    family = FAMILIES[config.architecture]

    def names(tensor: Tensor) -> set[str]:
        return {tensor.gguf.format(layer=layer) for layer in range(config.num_layers)}

    expected = set().union(*(names(tensor) for tensor in family.tensors))
    if missing := sorted(expected - found):
        raise ValueError(f"{path}: expected {len(expected)} tensors, got none named {', '.join(missing[:4])}")
    if extra := sorted(found - expected - {family.head.gguf}):
        raise NotImplementedError(f"{path}: tensor {extra[0]!r} is no part of the {config.architecture} decoder")
