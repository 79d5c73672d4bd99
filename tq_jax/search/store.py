"""Indexes on disk: one safetensors file, checked as a whole before anything is returned."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.format import Code
from pallas_kernels.packing import packed_bytes
from tq_jax.search.basis import LearnedBasis
from tq_jax.search.index import Index, round_up
from tq_jax.search.spec import IndexSpec, widths_bytes

FORMAT = "tq-jax index 1"


def save(index: Index, path: str | os.PathLike) -> None:
    """Writes the vectors in use and what they share; needs the `safetensors` package.

    Args:
        index: The index.
        path: Where to; an existing file is replaced only once the new one is complete.
    """
    from safetensors.numpy import save_file

    count = int(index.count)
    rows = {"packed": index.code.packed, "scale": index.code.scale, "signs": index.code.signs}
    rows |= {"residual": index.code.residual, "offset": index.offset}
    shared = {"mean": index.basis.mean, "rotation": index.basis.rotation, "gain": index.basis.gain}
    shared |= {"unit": index.basis.unit, "sketch": index.basis.sketch}
    arrays = {name: np.asarray(array)[:count] for name, array in rows.items() if array is not None}
    arrays |= {name: np.asarray(array) for name, array in shared.items() if array is not None}
    header = {"format": FORMAT, "spec": dataclasses.asdict(index.spec), "widths": index.widths}
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target.parent) as folder:
        written = Path(folder) / target.name
        save_file(
            {name: np.asarray(a, order="C") for name, a in arrays.items()}, written, {"tq_jax": json.dumps(header)}
        )
        written.replace(target)


def load(path: str | os.PathLike) -> Index:
    """Reads an index; needs the `safetensors` package.

    Args:
        path: What `save` wrote.

    Returns:
        The index, with the same codes and ids.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file is damaged or is no index: header, names, types, shapes and finiteness are checked.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            header, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.name}: expected a safetensors file, got a damaged one: {error}") from error
    try:
        return _checked(header, arrays)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _checked(header: dict[str, str], arrays: dict[str, np.ndarray]) -> Index:
    spec, widths = _parsed(header.get("tq_jax"))
    count = len(arrays["packed"]) if "packed" in arrays and arrays["packed"].ndim else 0
    expected = _expected(spec, count, widths_bytes(widths))
    found = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        lines = (f"{name}: expected {expected.get(name)}, got {found.get(name)}" for name in wrong)
        raise ValueError("; ".join(lines))
    for name, array in arrays.items():
        if array.dtype != np.uint8 and not np.isfinite(array).all():
            raise ValueError(f"expected finite numbers in {name}, got NaN or infinity")
    padding = round_up(max(count, 1)) - count

    def rows(name: str) -> Any:
        return _padded(arrays[name], padding) if name in arrays else None

    def shared(name: str) -> Any:
        return jnp.asarray(arrays[name]) if name in arrays else None

    code = Code(rows("packed"), rows("scale"), signs=rows("signs"), residual=rows("residual"))
    basis = LearnedBasis(**{field.name: shared(field.name) for field in dataclasses.fields(LearnedBasis)})
    return Index(code, rows("offset"), jnp.asarray(count, jnp.int32), basis, spec, widths)


def _padded(array: np.ndarray, rows: int) -> jax.Array:
    return jnp.asarray(np.pad(array, [(0, rows)] + [(0, 0)] * (array.ndim - 1)))


def _parsed(text: str | None) -> tuple[IndexSpec, Any]:
    """The spec and the widths of a header."""
    try:
        header = json.loads(text or "null")
        if header["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}, got {header['format']!r}")
        spec = IndexSpec(**header["spec"])
        widths = tuple((int(count), int(bits)) for count, bits in header["widths"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected the header of an index ({FORMAT!r}), got {text!r}") from error
    if sum(count for count, _ in widths) != spec.dim or any(n < 1 or not 0 <= bits <= 8 for n, bits in widths):
        raise ValueError(f"expected runs of 0 to 8 bits that cover {spec.dim} channels, got {widths}")
    return spec, widths


def _expected(spec: IndexSpec, count: int, code_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    dim = spec.dim
    arrays = {"packed": ("uint8", (count, code_bytes)), "scale": ("float16", (count,))}
    arrays |= {"mean": ("float32", (dim,)), "rotation": ("float32", (dim, dim)), "gain": ("float32", (dim,))}
    arrays |= {"unit": ("float32", ())}
    if spec.has_offset:
        arrays["offset"] = ("float16", (count,))
    if spec.kind == "prod":
        arrays |= {"signs": ("uint8", (count, packed_bytes(dim, 1))), "residual": ("float16", (count,))}
        arrays["sketch"] = ("float32", (dim, dim))
    return arrays
