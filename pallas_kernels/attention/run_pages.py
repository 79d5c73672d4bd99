"""What the public ops over packed pages have in common: checks, and the choice of an implementation."""

import warnings
from types import ModuleType
from typing import Any

import jax

from pallas_kernels.attention import reference
from pallas_kernels.attention.partial import Partial
from pallas_kernels.format import VectorFormat
from pallas_kernels.pages import Pages

IMPLEMENTATIONS = ("auto", "reference", "triton")


def attend_pages(
    op: str,
    kernel: ModuleType,
    query: Any,
    pages: Pages,
    block_table: Any,
    lengths: Any,
    *,
    key_format: VectorFormat,
    value_format: VectorFormat,
    sketch_query: Any,
    implementation: str,
    config: Any,
    **arguments: Any,
) -> Partial:
    """Runs an op by the reference or by the kernel of a module with `attend_pages` and `check_supported`.

    Raises:
        ValueError: If head counts or dims do not fit, or sketch_query is missing or superfluous.
        NotImplementedError: For an implementation that does not exist, or "triton" where it does not support the case.
    """
    kv_heads = pages.keys.packed.shape[1]
    if query.shape[-1] != key_format.dim or query.shape[2] % kv_heads:
        raise ValueError(
            f"expected queries with a multiple of {kv_heads} heads and dim {key_format.dim}, got {query.shape}"
        )
    if (sketch_query is not None) != getattr(key_format, "residual", False):
        raise ValueError(f"expected sketch_query exactly for Prod keys, got sketch_query={sketch_query is not None}")
    if implementation not in IMPLEMENTATIONS:
        raise NotImplementedError(f"implementation={implementation!r}; {op}_attention has: {IMPLEMENTATIONS}")
    formats = {"key_format": key_format, "value_format": value_format}
    arguments |= formats | {"sketch_query": sketch_query}
    if implementation == "auto":
        implementation = _best(op, kernel, query.shape, pages, formats, config)
    if implementation == "triton":
        return kernel.attend_pages(query, pages, block_table, lengths, config=config, **arguments)
    return reference.attend_pages(query, pages, block_table, lengths, **arguments)


def _best(
    op: str,
    kernel: ModuleType,
    query_shape: tuple[int, ...],
    pages: Pages,
    formats: dict[str, VectorFormat],
    config: Any,
) -> str:
    """The kernel on a GPU unless it does not support the case, which is warned about (once, by Python's default)."""
    if jax.default_backend() != "gpu":
        return "reference"
    try:
        kernel.check_supported(query_shape, pages, formats["key_format"], formats["value_format"], config)
    except NotImplementedError as error:
        warnings.warn(f"{op} attention runs as the slow reference: {error}", stacklevel=4)
        return "reference"
    return "triton"
