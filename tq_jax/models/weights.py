"""Decoders from checkpoints: Hugging Face directories of safetensors, and GGUF files converted to such a directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tq_jax.files import save_readable
from tq_jax.models.checkpoint import WEIGHTS, open_tensors
from tq_jax.models.config import DecoderConfig, Run
from tq_jax.models.config_hf import config_from_hf, config_to_hf
from tq_jax.models.decoder import Decoder
from tq_jax.models.dequantize import dequantized
from tq_jax.models.families import FAMILIES, check_tensor_names, tensor_names
from tq_jax.models.fetch import cache_dir
from tq_jax.models.fields import read_json
from tq_jax.models.gguf_file import hf_tensors, read_gguf
from tq_jax.models.quantization import quantization_from_hf
from tq_jax.models.sharding import AXES, Layout, MeshAxes, place
from tq_jax.models.tensors import Tensor
from tq_jax.models.tokenizer_gguf import tokenizer_from_gguf

_FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights, as safetensors writes them."""

ParameterPath = tuple[str | int, ...]
"""Keys of a parameter in the state of a decoder."""

# The version is part of the key under which conversions are cached. Raise it whenever their contents change.
_CONVERSION = 2


def load_decoder(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = "float32",
    max_context: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axes: MeshAxes = AXES,
) -> Decoder:
    """Load a decoder from a Hugging Face directory (`config.json` and safetensors, one file or sharded).

    Args:
        directory: Holds `config.json`, and `model.safetensors` or `model.safetensors.index.json` with its shards. The
            single file counts where there is one, whatever an index beside it names.
        dtype: Type of parameters and activations.
        max_context: Tokens that are ever attended over, at most those of the model, which are the default. Models with
            "longrope" scaling have other frequencies for contexts that are no longer than their original one.
        mesh: Devices on which the parameters are placed as they are read, see `sharding.decoder_shardings`; no device
            ever holds more than its part. On several hosts each of them reads the directory. None for one device.
        axes: Names of the mesh's axes.

    Returns:
        The decoder with the parameters of the checkpoint.

    Raises:
        FileNotFoundError: If a file is missing.
        NotImplementedError: For an architecture, option, quantization, tensor or type of tensor that `Decoder` does not
            support, or a mesh over which the decoder cannot be spread.
        ValueError: If a file is corrupt or truncated, if tensors are missing or of the wrong shape, or if the model has
            no such context.
    """
    directory = Path(directory)
    config = _within(read_config(directory), max_context)
    quantization = quantization_from_hf(read_json(directory / "config.json"))
    with open_tensors(directory) as (types, read):
        if quantization is not None:
            types, read = dequantized(quantization, types, read, expected=tensor_names(config, kind="hf"))
        check_tensor_names(directory, config, set(types), kind="hf")
        _require_float_types(directory, types)
        layout = None if mesh is None else Layout(mesh, axes)
        if layout is not None:
            layout.require(config)
        return _build(directory, config, read, jnp.dtype(dtype), layout)


def _within(config: DecoderConfig, max_context: int | None) -> DecoderConfig:
    """The config of a decoder that attends over fewer tokens."""
    if max_context is None:
        return config
    if not 1 <= max_context <= config.max_context:
        raise ValueError(f"max_context: expected 1 to the model's {config.max_context} tokens, got {max_context}")
    return dataclasses.replace(config, max_context=max_context)


def read_config(directory: Path) -> DecoderConfig:
    """Read `config.json`, and `generation_config.json` if there is one."""
    config, generation = read_json(directory / "config.json"), directory / "generation_config.json"
    return config_from_hf(config, generation_config=read_json(generation) if generation.is_file() else None)


def convert_gguf(path: str | os.PathLike[str]) -> Path:
    """Convert a GGUF file to a Hugging Face directory below `cache_dir`, once.

    The directory is written under another name and renamed, so an interrupted conversion leaves nothing behind that
    looks complete.

    Args:
        path: A `.gguf` file.

    Returns:
        The directory, with float32 `model.safetensors`, `config.json` and the tokenizer.

    Raises:
        FileNotFoundError: If there is no such file.
        NotImplementedError: For an architecture, option, tensor or tokenizer that is not supported.
        ValueError: If the file is corrupt or truncated.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    stat = path.stat()
    key = hashlib.sha256(f"{_CONVERSION}:{path}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    directory = cache_dir() / "converted" / f"{path.stem}-{key}"
    if directory.is_dir():
        return directory
    file = read_gguf(path)
    tokenizer = tokenizer_from_gguf(file.metadata)
    tensors = hf_tensors(file)
    with publish(directory) as building:
        save_readable(building / WEIGHTS, tensors)
        (building / "config.json").write_text(json.dumps(config_to_hf(file.config), indent=2), encoding="utf-8")
        tokenizer.save(building)
    return directory


@contextmanager
def publish(directory: Path) -> Iterator[Path]:
    """Yield a temporary sibling of a directory: it takes the directory's name if the block ends without an error.

    If the block raises, the sibling is deleted.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = directory.parent / f".{directory.name}-{uuid.uuid4().hex}"
    building.mkdir()
    try:
        yield building
        try:
            building.rename(directory)
        except OSError:
            # If another process has finished first, its directory has the same contents.
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _require_float_types(directory: Path, types: Mapping[str, str]) -> None:
    """Raise NotImplementedError for weights whose numbers mean nothing without scales that are stored elsewhere."""
    for name, kind in sorted(types.items()):
        if kind not in _FLOATS:
            raise NotImplementedError(
                f"{directory}: {name} has type {kind}: supported are {', '.join(_FLOATS)}. Quantized weights are to be "
                "dequantized to one of them, or given as a GGUF file"
            )


def _build(
    directory: Path,
    config: DecoderConfig,
    read: Callable[[str], np.ndarray],
    dtype: jnp.dtype,
    layout: Layout | None,
) -> Decoder:
    """A decoder with the parameters that `read` returns, converted to `dtype`.

    A parameter goes to the device as soon as its tensors are read, so that the host never holds more than one.
    """
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    leaves = dict(nnx.to_flat_state(state))
    for path, slots in _stored_in(config, abstract.runs).items():
        variable = leaves.pop(path)
        buffer = np.empty(variable.shape, dtype)
        for index, tensor, name in slots:
            parameter, array = buffer[index], read(name)
            if array.shape != (shape := tensor.stored_shape(parameter)):
                raise ValueError(f"{directory}: {name}: expected shape {shape}, got {array.shape}")
            tensor.fill(parameter, array, config)
        sharding = None if layout is None else layout.parameter(path, config)
        variable.set_value(jnp.asarray(buffer) if sharding is None else place(buffer, sharding))
    if leaves:
        raise RuntimeError(f"parameters without a tensor: {sorted(map(str, leaves))}")
    return nnx.merge(graph, state)


def _stored_in(
    config: DecoderConfig, runs: Sequence[Run]
) -> dict[ParameterPath, list[tuple[tuple[int, ...], Tensor, str]]]:
    """What fills each parameter: the layer of its run and the expert, the tensor, and its name in a checkpoint."""
    found: dict[ParameterPath, list[tuple[tuple[int, ...], Tensor, str]]] = {}
    run_of = {run.first + i: (number, i) for number, run in enumerate(runs) for i in range(run.count)}
    for tensor in FAMILIES[config.architecture].stored(tied_head=config.tied_head):
        path = tuple(tensor.path.split("."))
        for slot in tensor.slots(config):
            expert = () if slot.expert is None else (slot.expert,)
            if slot.layer is None:
                found.setdefault(path, []).append((expert, tensor, slot.name))
                continue
            number, layer = run_of[slot.layer]
            found.setdefault(("blocks", number, *path), []).append(((layer, *expert), tensor, slot.name))
    return found
