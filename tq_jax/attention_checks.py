"""Checks of the arguments of attention."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tq_jax.cache import Cache, require_row_integers
from tq_jax.cache_spec import CacheSpec
from tq_jax.quantizer import is_traced


def checked(
    query: Array | jax.ShapeDtypeStruct,
    cache: Cache,
    chunk: tuple[Array, Array] | None,
    lengths: Array | None,
    rows: Array | None,
    only: Array | None,
    sink_logits: Array | None,
    **above_zero: float | None,
) -> tuple[Array | None, ...]:
    """Rows, lengths and places of single queries as int32; raises ValueError for arrays or options that do not fit."""
    batch = cache.rows if rows is None else rows.shape[0]
    check_query(cache.spec, batch, query, sink_logits, **above_zero)
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"expected floating point queries, got dtype {query.dtype}")
    require_row_integers(batch, lengths=lengths, rows=rows, only=only)
    if only is not None and (chunk is None or query.shape[1] != 1):
        found = f"{query.shape[1]} queries {'without' if chunk is None else 'with'} a chunk"
        raise ValueError(f"only: expected one query per row, and a chunk, got {found}")
    tokens = (query if chunk is None else chunk[0]).shape[1]
    _check_rows(lengths=(lengths, tokens), rows=(rows, cache.rows - 1), only=(only, tokens - 1))
    if chunk is not None:
        check_chunk(cache.spec, query, *chunk, tokens=None if only is None else tokens)
    return tuple(None if x is None else x.astype(jnp.int32) for x in (rows, lengths, only))


def visible_tokens(spec: CacheSpec, sliding_window: int | None, *, appended: int) -> int | None:
    """The sliding window of queries to a cache; None if it hides nothing.

    Args:
        spec: Spec of the cache.
        sliding_window: The window asked for; None for that of the spec.
        appended: Query tokens that the cache holds already.

    Raises:
        ValueError: If queries would see tokens that the cache no longer holds.

    Example:
        >>> spec = CacheSpec.recommended(8, 128, max_tokens=32768, sliding_window=1024)
        >>> visible_tokens(spec, None, appended=1), visible_tokens(spec, 512, appended=500)
        (1024, 512)
    """
    window = spec.sliding_window if sliding_window is None else sliding_window
    window = spec.max_tokens if window is None else min(window, spec.max_tokens)
    kept, seen = spec.kept_tokens, window - 1 + appended
    if min(seen, spec.max_tokens) > kept:
        remedy = "; attend with chunk= before they are appended, or keep more" if appended > 1 else ""
        raise ValueError(
            f"expected queries that see at most the {kept} latest tokens of each row, which a cache of "
            f"sliding_window={spec.sliding_window} keeps, got {appended} appended queries with "
            f"sliding_window={window}, which see {seen}{remedy}"
        )
    return None if window == spec.max_tokens else window


def check_chunk(
    spec: CacheSpec, query: Array | jax.ShapeDtypeStruct, key: Array, value: Array, *, tokens: int | None = None
) -> None:
    """Raises ValueError for keys and values of a chunk that do not fit the queries, one per token by default."""
    expected = (query.shape[0], tokens or query.shape[1], spec.num_kv_heads, spec.head_dim)
    if key.shape != expected or value.shape != expected:
        raise ValueError(f"expected keys and values of a chunk of shape {expected}, got {key.shape} and {value.shape}")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (key, value)):
        raise ValueError(f"expected floating point keys and values of a chunk, got {key.dtype} and {value.dtype}")


def check_query(spec: CacheSpec, batch: int, query: Any, sink_logits: Any, **above_zero: float | None) -> None:
    """Raises ValueError for shapes of queries or sink logits, of any framework, or for options that do not fit."""
    shape = tuple(query.shape)
    fits = len(shape) == 4 and shape[0] == batch and shape[2] % spec.num_kv_heads == 0 and shape[3] == spec.head_dim
    if not fits:
        raise ValueError(
            f"expected query of shape ({batch}, tokens, a multiple of {spec.num_kv_heads}, {spec.head_dim}), "
            f"got {shape}"
        )
    for name, value in above_zero.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"expected {name} above 0{' and finite' * (value == math.inf)}, got {value}")
    if sink_logits is not None and tuple(sink_logits.shape) != shape[2:3]:
        raise ValueError(f"expected sink_logits of shape {shape[2:3]}, got {tuple(sink_logits.shape)}")


def _check_rows(**given: tuple[Any, int]) -> None:
    """Raises ValueError for integers per row, each given with its largest value, that are out of range."""
    for name, (array, most) in given.items():
        if array is None or is_traced(array):
            continue
        if np.any(np.asarray(array) < 0) or np.any(np.asarray(array) > most):
            raise ValueError(f"expected {name} from 0 to {most}, got {np.asarray(array).tolist()}")
