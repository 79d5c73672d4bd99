"""The public encode ops."""

import warnings
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.encode import launch_triton, reference
from pallas_kernels.encode.config import TileConfig
from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.format import Code, ScaleRule, VectorFormat
from pallas_kernels.pages import Pages

IMPLEMENTATIONS = ("auto", "reference", "triton")


def encode(
    vectors: Float[Array, "*batch dim"],
    fmt: VectorFormat,
    *,
    scale: ScaleRule = "least_squares",
    search: bool = False,
    sketch: Float[Array, "dim dim"] | None = None,
    implementation: str = "auto",
) -> Code:
    """Encodes vectors that already are in the rotated basis.

    Args:
        vectors: Rotated vectors (for a GroupFormat, the vectors themselves), any float type; computed in float32.
        fmt: What to write.
        scale: Which scalar to store with the codes of a CodebookFormat; see `tq_jax.QuantizerSpec`.
        search: Whether to search the step of each vector.
        sketch: The Gaussian matrix S of Prod, in the rotated basis; needed exactly if the format has a residual.
        implementation: "reference" is jnp on any device.

    Returns:
        The code. A vector with a NaN or infinite coordinate gets a NaN or infinite scale, never a finite wrong one.

    Raises:
        ValueError: If the last axis is not fmt.dim, or sketch is missing or superfluous.
        NotImplementedError: For an implementation that does not exist.
    """
    if vectors.ndim == 0 or vectors.shape[-1] != fmt.dim:
        raise ValueError(f"expected vectors of {fmt.dim} channels, got shape {vectors.shape}")
    if (sketch is not None) != getattr(fmt, "residual", False):
        raise ValueError(f"expected a sketch exactly for formats with a residual, got sketch={sketch is not None}")
    if implementation not in ("auto", "reference"):
        raise NotImplementedError(f"implementation={implementation!r}; encode has: 'reference'")
    return reference.encode(vectors, fmt, scale=scale, search=search, sketch=sketch)


def encode_pages(
    keys: Float[Array, "b t h d"],
    values: Float[Array, "b t h d"],
    pages: Pages,
    slots: Int[Array, "b t"],
    *,
    key: Encoder,
    value: Encoder,
    mean: Float[Array, "b h d"] | None = None,
    weight: Float[Array, "b h d"] | None = None,
    implementation: str = "auto",
    config: TileConfig | None = None,
) -> Pages:
    """Rotates and encodes tokens and writes them into their pages, in place where the pools are donated.

    Codes of the kernel are those of the reference but for ties: a channel that lies within float32 rounding of a
    threshold, a vector two of whose searched steps are equally good to rounding.

    Args:
        keys: Keys of t tokens of every row, any float type.
        values: Values likewise.
        pages: The pools.
        slots: Where each token goes, page * page_size + place; negative skips the token, whatever it holds. Different.
        key: How keys are encoded.
        value: How values are.
        mean: Subtracted from the keys of each row and head before anything else.
        weight: Multiplied to them then; given with the mean or not at all.
        implementation: "reference" is jnp on any device; "triton" the Pallas kernel, which runs interpreted, slowly,
            where JAX has no GPU; "auto" the kernel on a GPU for what it supports and the reference elsewhere.
        config: Tile sizes of the kernel; by default those for the number of tokens.

    Returns:
        The pools; bytes of other slots are as they were.

    Raises:
        ValueError: If shapes do not fit, or one of mean and weight is missing.
        NotImplementedError: For an implementation that does not exist, or "triton" where it does not support the case.
    """
    _check_pages(keys, values, pages, slots, key, value)
    if (mean is None) != (weight is None):
        raise ValueError(f"expected mean and weight both or neither, got {mean is not None} and {weight is not None}")
    if implementation not in IMPLEMENTATIONS:
        raise NotImplementedError(f"implementation={implementation!r}; encode_pages has: {IMPLEMENTATIONS}")
    if implementation == "auto":
        implementation = _best(pages, key, value)
    arguments: dict[str, Any] = dict(key=key, value=value, mean=mean, weight=weight)
    if implementation == "triton":
        return launch_triton.encode_pages(keys, values, pages, slots, config=config, **arguments)
    return reference.encode_pages(keys, values, pages, slots, **arguments)


def _check_pages(keys: Array, values: Array, pages: Pages, slots: Array, key: Encoder, value: Encoder) -> None:
    heads = pages.values.scale.shape[1]
    for name, x, encoder in (("keys", keys, key), ("values", values, value)):
        if x.shape[2:] != (heads, encoder.format.dim) or x.shape[:2] != slots.shape:
            raise ValueError(
                f"expected {name} of shape {(*slots.shape, heads, encoder.format.dim)} "
                f"(slots, KV heads of the pages, dim of the format), got {tuple(x.shape)}"
            )
        if (encoder.sketch is not None) != getattr(encoder.format, "residual", False):
            raise ValueError(f"expected a sketch exactly for formats with a residual, got {encoder.sketch is not None}")


def _best(pages: Pages, key: Encoder, value: Encoder) -> str:
    """The kernel on a GPU unless it does not support the case, which is warned about (once, by Python's default)."""
    if jax.default_backend() != "gpu":
        return "reference"
    try:
        launch_triton.check_supported(pages, key, value)
    except NotImplementedError as error:
        warnings.warn(f"tokens are encoded by the slow reference: {error}", stacklevel=3)
        return "reference"
    return "triton"
