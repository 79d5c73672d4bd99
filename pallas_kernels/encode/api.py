"""The public encode ops."""

import functools

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose
from pallas_kernels.encode import launch_triton, reference
from pallas_kernels.encode.arguments import EncodeArguments
from pallas_kernels.encode.config import TileConfig
from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.format import Code, ScaleRule, VectorFormat
from pallas_kernels.pages import Pages


def encode(
    vectors: Float[Array, "*batch dim"],
    fmt: VectorFormat,
    *,
    scale: ScaleRule = "least_squares",
    search: bool = False,
    sketch: Float[Array, "dim dim"] | None = None,
    implementation: str = "auto",
) -> Code:
    """Encodes vectors that are in the rotated basis already.

    Args:
        vectors: Rotated vectors (for a GroupFormat, the vectors themselves), any float type; computed in float32.
        fmt: Format of the code.
        scale: Rule for the scalar that is stored with the codes of a CodebookFormat; see `tq_jax.QuantizerSpec`.
        search: Whether to search the step of each vector.
        sketch: The Gaussian matrix S of Prod, in the rotated basis; given exactly if the format has a residual.
        implementation: "auto" or "reference", jnp on any device.

    Returns:
        The code. A vector with a NaN or infinite coordinate gets a NaN or infinite scale, never a finite wrong one.

    Raises:
        ValueError: If the last axis is not fmt.dim, or the sketch is missing or superfluous.
        NotImplementedError: If the implementation does not exist.
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
    """Rotates and encodes tokens and writes their codes into pages, in place if the pools are donated.

    The kernel and the reference give the same codes except for ties: a channel within float32 rounding of a threshold,
    or a vector two of whose searched steps are equally good up to rounding. For a magnitude exactly at a threshold the
    reference takes the level below; the kernel takes the level above where it works on channel quads.

    Args:
        keys: Keys of t tokens per row, any float type.
        values: Values of the same tokens, any float type.
        pages: The pools.
        slots: Page slot of each token, page * page_size + place. All slots are different; a token with a negative slot
            is skipped, whatever it holds.
        key: The encoder of keys.
        value: The encoder of values.
        mean: Subtracted from the keys, per row and head, before the rotation.
        weight: Factor of the centred keys, per row and head; given exactly if the mean is given.
        implementation: "reference" is jnp on any device; "triton" is the Pallas kernel, interpreted (slowly) where JAX
            has no GPU; "auto" is the kernel on a GPU if it supports the case, and the reference otherwise.
        config: Tile sizes of the kernel; by default chosen for the number of tokens.

    Returns:
        The pools; bytes of other slots are unchanged.

    Raises:
        ValueError: If shapes do not fit, or one of mean and weight is missing.
        NotImplementedError: If the implementation does not exist, or "triton" does not support the case.
    """
    _check_pages(keys, values, pages, slots, key, value)
    if (mean is None) != (weight is None):
        raise ValueError(f"expected mean and weight both or neither, got {mean is not None} and {weight is not None}")
    check = functools.partial(launch_triton.check_supported, pages, key, value)
    arguments = EncodeArguments(keys, values, slots, key, value, mean, weight)
    if choose(implementation, op="encode_pages", check=check) == "triton":
        return launch_triton.encode_pages(arguments, pages, config=config)
    return reference.encode_pages(arguments, pages)


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
