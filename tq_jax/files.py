"""Files of arrays: safetensors with a JSON header, written and checked as a whole; and the directory of a cache."""

import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type and shape of each array by name."""

HEADER, DIGEST = "tq_jax", "sha256"
"""Name of the JSON header in the metadata of a file, and name of the digest in that header."""


def cache_dir() -> Path:
    """Directory of downloads and conversions.

    Returns:
        `$TQ_JAX_CACHE`, else `$XDG_CACHE_HOME/tq-jax`, else `~/.cache/tq-jax`. The directory may not exist yet.
    """
    if own := os.environ.get("TQ_JAX_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tq-jax"


def write_arrays(path: str | os.PathLike, header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file; needs the `safetensors` package.

    Args:
        path: The file to write; an existing one is replaced only when the new one is complete, and passes on its
            permissions.
        header: Plain data, with a "format".
        arrays: The arrays by name.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder.
        ModuleNotFoundError: Without `safetensors`.
    """
    _require_safetensors()
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"expected the path of a file, got the folder {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent}")
    dense = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target.parent) as folder:
        written = Path(folder) / target.name
        save_readable(written, dense, {HEADER: json.dumps({**header, DIGEST: _digest(header, dense)})})
        if target.exists():
            written.chmod(target.stat().st_mode)
        written.replace(target)


def save_readable(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors with the permissions of any new file; by itself, safetensors lets the owner alone read it.

    Args:
        path: The file, which does not exist.
        arrays: The arrays by name, each of them contiguous.
        metadata: Texts by name for the metadata of the file.
    """
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(arrays), path, metadata)
    path.chmod(mode)


def read_arrays(
    path: str | os.PathLike, expected: Callable[[dict[str, Any]], Shapes]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a file that `write_arrays` wrote; needs the `safetensors` package.

    Args:
        path: The file.
        expected: Returns the types and shapes that a header promises; may raise ValueError, KeyError or TypeError.

    Returns:
        The header and the arrays.

    Raises:
        FileNotFoundError: If the file does not exist.
        IsADirectoryError: If the path is a folder.
        ModuleNotFoundError: Without `safetensors`.
        ValueError: If it is damaged or of another kind: header, names, types, shapes and every byte are checked.
    """
    text, arrays = _load(Path(path), with_arrays=True)
    try:
        header = _parsed(text)
        digest = header.pop(DIGEST, None)
        _require_shapes(arrays, expected(header))
        found = _digest(header, arrays)
        if found != digest:
            raise ValueError(f"expected contents of {DIGEST} {digest}, got {found}: the file is damaged")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{Path(path).name}: expected a complete header, got {text}") from error
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{Path(path).name}: {error}") from error
    return header, arrays


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the header alone, which has a "format"; raises as `read_arrays` does, but does not check the arrays."""
    text, _ = _load(Path(path), with_arrays=False)
    try:
        return _parsed(text)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def require_format(header: dict[str, Any], wanted: str) -> None:
    """Raises ValueError if a header has another format than the wanted one."""
    if header["format"] != wanted:
        raise ValueError(f"expected format {wanted!r}, got {header['format']!r}")


def _load(path: Path, *, with_arrays: bool) -> tuple[str, dict[str, np.ndarray]]:
    """Reads the text of the header ("" if there is none) and, if wanted, the arrays."""
    _require_safetensors()
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise IsADirectoryError(f"expected the path of a file, got the folder {path}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys() if with_arrays else ()
            return (file.metadata() or {}).get(HEADER, ""), {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path.name}: expected a safetensors file, got a damaged one: {error}") from error


def _require_safetensors() -> None:
    """Raises ModuleNotFoundError with the extra of this package that installs `safetensors`, if it is missing."""
    try:
        importlib.import_module("safetensors")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}, which the extra `models` of tq-jax installs") from error


def _parsed(text: str) -> dict[str, Any]:
    """The header of a text; raises ValueError if it is none."""
    try:
        header = json.loads(text)
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or "format" not in header:
        raise ValueError(f"expected the header of a tq-jax file, got {text!r}")
    return header


def _require_shapes(arrays: Mapping[str, np.ndarray], expected: Shapes) -> None:
    """Raises ValueError unless the arrays have the expected names, types and shapes."""
    found = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise ValueError("; ".join(f"{name}: expected {expected.get(name)}, got {found.get(name)}" for name in wrong))


def _digest(header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a header and of the names, types, shapes and bytes of arrays."""
    state = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        state.update(arrays[name].data)
    return state.hexdigest()
