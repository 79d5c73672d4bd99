"""Checkpoints to decoders: Hugging Face directories of safetensors, and GGUF files converted to such a directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tq_jax.models.config import DecoderConfig
from tq_jax.models.config_hf import config_from_hf, config_to_hf
from tq_jax.models.decoder import Decoder
from tq_jax.models.families import FAMILIES, Tensor
from tq_jax.models.fetch import cache_dir
from tq_jax.models.fields import FILES, check_fields, read_json
from tq_jax.models.gguf_file import hf_tensors, read_gguf
from tq_jax.models.tokenizer_gguf import tokenizer_from_gguf

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Part of the key under which conversions are cached: raise it whenever their contents change.
_CONVERSION = 1


def load_decoder(directory: str | os.PathLike[str], *, dtype: Any = "float32") -> Decoder:
    """Load a decoder from a Hugging Face directory (``config.json`` and safetensors, one file or sharded).

    Args:
        directory: holds ``config.json`` and ``model.safetensors`` or ``model.safetensors.index.json``.
        dtype: dtype of parameters and activations.

    Raises:
        FileNotFoundError: a file is missing.
        NotImplementedError: an architecture, option or tensor that the decoders here do not have.
        ValueError: a file is corrupt or truncated, or tensors are missing or of the wrong shape.
    """
    directory = Path(directory)
    config = read_config(directory)
    with _open_tensors(directory) as (names, read):
        _check_names(directory, config, names)
        return _build(directory, config, read, jnp.dtype(dtype))


def read_config(directory: Path) -> DecoderConfig:
    """Read ``config.json``, and ``generation_config.json`` where there is one."""
    path, generation = directory / "config.json", directory / "generation_config.json"
    contents = read_json(path), read_json(generation) if generation.is_file() else None
    return config_from_hf(contents[0], generation_config=contents[1])


def convert_gguf(path: str | os.PathLike[str]) -> Path:
    """Convert a GGUF file to a Hugging Face directory in the cache, once.

    Args:
        path: a ``.gguf`` file.

    Returns:
        The directory, with float32 ``model.safetensors``, ``config.json`` and the tokenizer. It is written under
        another name and renamed, so an interrupted conversion leaves nothing behind that looks complete.

    Raises:
        FileNotFoundError: there is no such file.
        NotImplementedError: an architecture, option, tensor or tokenizer that is not supported.
        ValueError: the file is corrupt or truncated.
    """
    from safetensors.numpy import save_file

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
        save_file(tensors, building / _WEIGHTS)
        (building / "config.json").write_text(json.dumps(config_to_hf(file.config), indent=2), encoding="utf-8")
        tokenizer.save(building)
    return directory


@contextmanager
def publish(directory: Path) -> Iterator[Path]:
    """A temporary sibling of ``directory`` that takes its name when the block ends well, and vanishes otherwise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = directory.parent / f".{directory.name}-{uuid.uuid4().hex}"
    building.mkdir()
    try:
        yield building
        try:
            building.rename(directory)
        except OSError:
            # Another process finished first; its directory has the same contents.
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _open_tensors(directory: Path) -> Iterator[tuple[set[str], Callable[[str], np.ndarray]]]:
    from safetensors import SafetensorError, safe_open

    single, index = directory / _WEIGHTS, directory / _INDEX
    if index.is_file():
        contents = read_json(index)
        check_fields(str(index), contents, {"weight_map": FILES})
        where = {name: directory / file for name, file in (contents.get("weight_map") or {}).items()}
        files = sorted(set(where.values()))
    elif single.is_file():
        where, files = {}, [single]
    else:
        raise FileNotFoundError(f"neither {_WEIGHTS} nor {_INDEX} in {directory}")
    with ExitStack() as stack:
        holders = {}
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{_INDEX} names {file.name}, which is not in {directory}")
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{file}: expected safetensors, got a corrupt or truncated file ({error})") from error
            holders |= {name: handle for name in handle.keys() if where.get(name, file) == file}  # noqa: SIM118
        if lost := sorted(where.keys() - holders.keys()):
            raise ValueError(f"{index}: expected {where[lost[0]].name} to hold {lost[0]!r}, got a file without it")
        yield set(holders), lambda name: holders[name].get_tensor(name)


def _check_names(directory: Path, config: DecoderConfig, found: set[str]) -> None:
    family = FAMILIES[config.architecture]
    expected = {name for tensor in _stored(config) for name in _names(tensor, config)}
    if missing := sorted(expected - found):
        raise ValueError(f"{directory}: expected {len(expected)} tensors, got none named {', '.join(missing[:4])}")
    # Tied checkpoints may repeat the embedding under the head's name.
    extra = {name for name in found - expected - {family.head.hf} if not name.endswith(family.hf_buffers)}
    if extra:
        raise NotImplementedError(f"{directory}: tensor {min(extra)!r} is no part of the {config.architecture} decoder")


def _stored(config: DecoderConfig) -> tuple[Tensor, ...]:
    family = FAMILIES[config.architecture]
    return family.tensors if config.tied_head else (*family.tensors, family.head)


def _names(tensor: Tensor, config: DecoderConfig) -> list[str]:
    return [tensor.hf.format(layer=layer) for layer in range(config.num_layers if tensor.per_layer else 1)]


def _build(directory: Path, config: DecoderConfig, read: Callable[[str], np.ndarray], dtype: jnp.dtype) -> Decoder:
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    leaves = dict(nnx.to_flat_state(state))
    for tensor in _stored(config):
        variable = leaves.pop(tuple(tensor.path.split(".")))
        shape = variable.shape[1:] if tensor.per_layer else variable.shape
        buffer = np.empty(variable.shape, dtype)
        slots: Sequence[Any] = list(buffer) if tensor.per_layer else [buffer]
        for slot, name in zip(slots, _names(tensor, config), strict=True):
            array = read(name)
            if array.shape != shape:
                raise ValueError(f"{directory}: {name}: expected shape {shape}, got {array.shape}")
            slot[...] = array
        variable.set_value(jnp.asarray(buffer))
    if leaves:
        raise RuntimeError(f"parameters without a tensor: {sorted(leaves)}")
    return nnx.merge(graph, state)
