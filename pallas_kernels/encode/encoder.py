"""The encoder: rotation, format and scale rule, which turn raw vectors into codes."""

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels.format import ScaleRule, VectorFormat
from pallas_kernels.pytree import pytree


@pytree
class Encoder:
    """A rotation, a format and the rule that chooses its scale; a pytree.

    Attributes:
        matrix: [dim, dim], the rotated vector is x @ matrix; None for vectors that are encoded as they are.
        sketch: The Gaussian matrix S of Prod, in the rotated basis; None for other formats.
        format: Format of the code (static).
        scale: The scale rule (static).
        search: Whether the step of each vector is searched (static).
        hadamard: Whether the matrix is signs of the channels (rows) times the Walsh-Hadamard matrix over sqrt(dim)
            (static). The kernel then multiplies by signs only, and adds.
    """

    matrix: Float[Array, "dim dim"] | None
    sketch: Float[Array, "dim dim"] | None
    format: VectorFormat = dataclasses.field(metadata={"static": True})
    scale: ScaleRule = dataclasses.field(default="least_squares", metadata={"static": True})
    search: bool = dataclasses.field(default=False, metadata={"static": True})
    hadamard: bool = dataclasses.field(default=False, metadata={"static": True})
