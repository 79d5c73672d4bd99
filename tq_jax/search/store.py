"""Indexes on disk: one file, checked as a whole before anything is returned."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.format import Code
from pallas_kernels.packing import packed_bytes
from tq_jax.files import Shapes, read_arrays, require_format, write_arrays
from tq_jax.search.basis import LearnedBasis
from tq_jax.search.index import Index, round_up
from tq_jax.search.spec import IndexSpec, widths_bytes

FORMAT = "tq-jax index 2"


def save(index: Index, path: str | os.PathLike) -> None:
    """Writes the vectors in use and their basis; needs the `safetensors` package.

    Args:
        index: The index.
        path: The file to write; an existing one is replaced only when the new one is complete.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    count = int(index.count)
    stored = {"packed": index.code.packed, "scale": index.code.scale, "signs": index.code.signs}
    stored |= {"residual": index.code.residual, "offset": index.offset}
    shared = {"mean": index.basis.mean, "rotation": index.basis.rotation, "gain": index.basis.gain}
    shared |= {"unit": index.basis.unit, "sketch": index.basis.sketch}
    arrays = {name: np.asarray(array)[:count] for name, array in stored.items() if array is not None}
    arrays |= {name: np.asarray(array) for name, array in shared.items() if array is not None}
    spec = dataclasses.asdict(index.spec)
    write_arrays(path, {"format": FORMAT, "spec": spec, "widths": index.widths, "count": count}, arrays)


def load(path: str | os.PathLike) -> Index:
    """Reads an index; needs the `safetensors` package.

    Args:
        path: A file that `save` wrote.

    Returns:
        The index, with the same codes and ids.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or holds no index: header, names, types, shapes and every byte are checked.
    """
    header, arrays = read_arrays(path, expected_arrays)
    spec, widths, count = _parsed(header)
    padding = round_up(max(count, 1)) - count

    def stored(name: str) -> Any:
        return _padded(arrays[name], padding) if name in arrays else None

    def shared(name: str) -> Any:
        return jnp.asarray(arrays[name]) if name in arrays else None

    code = Code(stored("packed"), stored("scale"), signs=stored("signs"), residual=stored("residual"))
    basis = LearnedBasis(**{field.name: shared(field.name) for field in dataclasses.fields(LearnedBasis)})
    return Index(code, stored("offset"), jnp.asarray(count, jnp.int32), basis, spec, widths)


def expected_arrays(header: dict[str, Any]) -> Shapes:
    """Types and shapes of the arrays of an index with this header; raises as `_parsed` does."""
    spec, widths, count = _parsed(header)
    dim = spec.dim
    arrays = {"packed": ("uint8", (count, widths_bytes(widths))), "scale": ("float16", (count,))}
    arrays |= {"mean": ("float32", (dim,)), "rotation": ("float32", (dim, dim)), "gain": ("float32", (dim,))}
    arrays |= {"unit": ("float32", ())}
    if spec.has_offset:
        arrays["offset"] = ("float16", (count,))
    if spec.kind == "prod":
        arrays |= {"signs": ("uint8", (count, packed_bytes(dim, 1))), "residual": ("float16", (count,))}
        arrays["sketch"] = ("float32", (dim, dim))
    return arrays


def _parsed(header: dict[str, Any]) -> tuple[IndexSpec, Any, int]:
    """Spec, widths and count in an index's header; raises ValueError, KeyError or TypeError if it is wrong."""
    require_format(header, FORMAT)
    spec, count = IndexSpec(**header["spec"]), int(header["count"])
    widths = tuple((int(channels), int(bits)) for channels, bits in header["widths"])
    if sum(channels for channels, _ in widths) != spec.dim or any(n < 1 or not 0 <= bits <= 8 for n, bits in widths):
        raise ValueError(f"expected runs of 0 to 8 bits that cover {spec.dim} channels, got {widths}")
    return spec, widths, count


def _padded(array: np.ndarray, more: int) -> jax.Array:
    """The array with zeros for more vectors."""
    return jnp.asarray(np.pad(array, [(0, more)] + [(0, 0)] * (array.ndim - 1)))
