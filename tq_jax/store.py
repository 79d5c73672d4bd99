"""Caches and key statistics on disk: the bytes that memory holds, in one safetensors file.

A file has the arrays of a cache under their dotted names ("pages.keys.packed", "exact_keys", "statistics.mean", ...).
In a file, pools of pages are [rows, pages, ...] and end with the last page in use. A spec without a sliding window is
written without that field, as it was before there was one.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tq_jax.cache import Cache, init_cache, require_counters, resize
from tq_jax.cache_spec import CacheSpec
from tq_jax.files import Shapes, read_arrays, require_format, write_arrays
from tq_jax.quantizer import QuantizerSpec, is_traced
from tq_jax.statistics import require_statistics

CACHE_FORMAT, STATISTICS_FORMAT = "tq-jax cache 1", "tq-jax key statistics 1"


def save_cache(cache: Cache, path: str | os.PathLike) -> None:
    """Writes a cache with its quantizers; needs the `safetensors` package.

    Args:
        cache: The cache, outside of jit.
        path: The file to write; an existing one is replaced only when the new one is complete.

    Raises:
        FileNotFoundError: If the folder does not exist.
        TypeError: For anything but a `Cache`, such as the caches of a decoder of local and other layers.
        ValueError: If the cache is being traced.

    Example:
        >>> import tempfile
        >>> import tq_jax as tq
        >>> cache = init_cache(CacheSpec.recommended(2, 64, max_tokens=4096), batch=1)
        >>> cache = tq.append(cache, jnp.ones((1, 300, 2, 64)), jnp.ones((1, 300, 2, 64)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_cache(cache, f"{folder}/prompt.safetensors")
        ...     again = load_cache(f"{folder}/prompt.safetensors", max_tokens=8192)
        >>> again.length.tolist(), again.spec.max_tokens
        ([300], 8192)
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"expected a tq_jax.Cache (a file holds one), got {type(cache).__name__}")
    if is_traced(cache):
        raise ValueError("expected a cache with values, got one that is being traced: save it outside of jit")
    spec, rows = cache.spec, cache.rows
    pages = min(-(-int(jnp.max(cache.compressed, initial=0)) // spec.page_size), spec.pages_per_row)

    def stored(name: str, leaf: jax.Array) -> jax.Array:
        return leaf.reshape(rows, spec.pages_per_row, *leaf.shape[1:])[:, :pages] if _is_paged(name) else leaf

    arrays = {name: np.asarray(stored(name, leaf)) for name, leaf in named_leaves(cache).items()}
    header = {"format": CACHE_FORMAT, "spec": spec_fields(spec), "rows": rows, "pages": pages}
    write_arrays(path, header, arrays)


def load_cache(path: str | os.PathLike, *, max_tokens: int | None = None) -> Cache:
    """Reads a cache; needs the `safetensors` package.

    Args:
        path: A file that `save_cache` wrote.
        max_tokens: Tokens that a row of the new cache can hold, see `tq_jax.resize`; as many as before by default.

    Returns:
        The cache, with the same bytes in every page in use.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or holds no cache (header, names, types, shapes, counters and every byte are
            checked), or if max_tokens does not fit.
    """
    header, arrays = read_arrays(path, expected_cache)
    spec, rows, pages = parse_cache(header)
    shapes = _shapes(spec, rows)
    require_counters(spec, arrays["length"].tolist(), arrays["compressed"].tolist())

    def in_memory(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not _is_paged(name):
            return jnp.asarray(arrays[name])
        pool = np.zeros((rows, spec.pages_per_row, *leaf.shape[1:]), leaf.dtype)
        pool[:, :pages] = arrays[name]
        return jnp.asarray(pool.reshape(leaf.shape))

    leaves = [in_memory(name, leaf) for name, leaf in named_leaves(shapes).items()]
    cache = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return cache if max_tokens is None else resize(cache, max_tokens)


def save_statistics(
    mean: Float[Array | np.ndarray, "layers h_kv d"],
    weight: Float[Array | np.ndarray, "layers h_kv d"],
    path: str | os.PathLike,
    *,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Writes key statistics of a model, see `tq_jax.statistics`; needs the `safetensors` package.

    Args:
        mean: Mean of the keys of each layer and KV head.
        weight: Weights of their channels, positive.
        path: The file to write; an existing one is replaced only when the new one is complete.
        model: Plain data that says of which model the keys are, see `tq_jax.statistics_files`.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: For arrays of other or different shapes, means that are not finite, or weights that are not positive
            and finite.
    """
    arrays = {"mean": np.asarray(mean, np.float32), "weight": np.asarray(weight, np.float32)}
    shape = arrays["mean"].shape
    if len(shape) != 3 or arrays["weight"].shape != shape:
        raise ValueError(f"expected mean and weight [layers, h_kv, d], got {shape} and {arrays['weight'].shape}")
    require_statistics(**arrays)
    header = {"format": STATISTICS_FORMAT, "shape": shape} | ({} if model is None else {"model": dict(model)})
    write_arrays(path, header, arrays)


def load_statistics(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Reads key statistics; needs the `safetensors` package.

    Args:
        path: A file that `save_statistics` wrote.

    Returns:
        Mean and weight, float32 [layers, h_kv, d].

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or holds no statistics.
    """
    _, arrays = read_arrays(path, expected_statistics)
    return arrays["mean"], arrays["weight"]


def spec_fields(spec: CacheSpec) -> dict[str, Any]:
    """The fields of a spec, for a header; `CacheSpec` gives the ones left out their value.

    Example:
        >>> "sliding_window" in spec_fields(CacheSpec.full_precision(num_kv_heads=2, head_dim=64, max_tokens=512))
        False
    """
    fields = dataclasses.asdict(spec)
    return {name: value for name, value in fields.items() if name != "sliding_window" or value is not None}


def expected_cache(header: dict[str, Any]) -> Shapes:
    """Types and shapes of the arrays of a cache with this header; raises as `parse_cache` does."""
    spec, rows, pages = parse_cache(header)
    shapes = {name: (str(leaf.dtype), leaf.shape) for name, leaf in named_leaves(_shapes(spec, rows)).items()}
    return {
        name: (dtype, (rows, pages, *shape[1:]) if _is_paged(name) else shape)
        for name, (dtype, shape) in shapes.items()
    }  # fmt: skip


def expected_statistics(header: dict[str, Any]) -> Shapes:
    """Types and shapes of key statistics with this header; raises ValueError, KeyError or TypeError if it is wrong."""
    require_format(header, STATISTICS_FORMAT)
    layers, heads, dim = header["shape"]
    return dict.fromkeys(("mean", "weight"), ("float32", (layers, heads, dim)))


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by dotted name.

    Example:
        >>> named_leaves({"a": [1, 2]})
        {'a.0': 1, 'a.1': 2}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path): leaf
        for path, leaf in leaves
    }


def _is_paged(name: str) -> bool:
    """Whether a leaf of a cache is a pool of pages."""
    return name.startswith("pages.")


def _shapes(spec: CacheSpec, rows: int) -> Cache:
    """A cache with shapes and types in place of its arrays."""
    return jax.eval_shape(functools.partial(init_cache, spec, rows))


def parse_cache(header: dict[str, Any]) -> tuple[CacheSpec, int, int]:
    """Spec, rows and pages per row in a cache's header; raises ValueError, KeyError or TypeError if it is wrong."""
    require_format(header, CACHE_FORMAT)
    quantizers = {name: header["spec"][name] for name in ("key", "value")}
    given = {name: None if fields is None else QuantizerSpec(**fields) for name, fields in quantizers.items()}
    spec, rows, pages = CacheSpec(**{**header["spec"], **given}), int(header["rows"]), int(header["pages"])
    if rows < 0 or not 0 <= pages <= spec.pages_per_row:
        raise ValueError(f"expected at least 0 rows of 0 to {spec.pages_per_row} pages, got {rows} of {pages}")
    return spec, rows, pages
