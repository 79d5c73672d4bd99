"""The tensors of a Hugging Face directory of safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tq_jax.models.fields import FILES, check_fields, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_FLOAT8 = "F8_E4M3"


@contextmanager
def open_tensors(directory: Path) -> Iterator[tuple[dict[str, str], Callable[[str], np.ndarray]]]:
    """Open the safetensors of a Hugging Face directory.

    Args:
        directory: Holds `WEIGHTS`, or `INDEX` with its shards; the single file counts where there is one.

    Yields:
        The types of the tensors by their names, and a function that reads a tensor by its name.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is corrupt or truncated, or lacks a tensor.
    """
    from safetensors import SafetensorError, safe_open

    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file():  # transformers leaves an old index behind when it writes a single file
        where, files = {}, [single]
    elif index.is_file():
        contents = read_json(index)
        check_fields(str(index), contents, {"weight_map": FILES})
        where = {name: directory / file for name, file in (contents.get("weight_map") or {}).items()}
        files = sorted(set(where.values()))
    else:
        raise FileNotFoundError(f"neither {WEIGHTS} nor {INDEX} in {directory}")
    with ExitStack() as stack:
        holders, source = {}, {}
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{INDEX} names {file.name}, which is not in {directory}")
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{file}: expected safetensors, got a corrupt or truncated file ({error})") from error
            own = [name for name in handle.keys() if where.get(name, file) == file]  # noqa: SIM118
            holders |= dict.fromkeys(own, handle)
            source |= dict.fromkeys(own, file)
        if lost := sorted(where.keys() - holders.keys()):
            raise ValueError(f"{index}: expected {where[lost[0]].name} to hold {lost[0]!r}, got a file without it")
        types = {name: handle.get_slice(name).get_dtype() for name, handle in holders.items()}

        def read(name: str) -> np.ndarray:
            if types[name] == _FLOAT8:
                return _read_float8(source[name], name)
            return holders[name].get_tensor(name)

        yield types, read


def _read_float8(file: Path, name: str) -> np.ndarray:
    """A tensor of type E4M3, which safetensors does not read into numpy.

    A file is the size of its header in eight bytes, the header in JSON, and the data.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(size))[name]
        start, end = entry["data_offsets"]
        stream.seek(8 + size + start)
        return np.frombuffer(stream.read(end - start), jnp.float8_e4m3fn).reshape(entry["shape"])
