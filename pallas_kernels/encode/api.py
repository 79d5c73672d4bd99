"""The public encode op."""

from jaxtyping import Array, Float

from pallas_kernels.encode import reference
from pallas_kernels.format import Code, ScaleRule, VectorFormat


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
