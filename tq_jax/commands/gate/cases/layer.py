"""Cases of the small kernels of a decoder layer: types, widths, norms and numbers of query heads."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layer import heads, norm
from pallas_kernels.layer.norm import NormWeights
from tq_jax.commands.gate.case import Case

BATCH = 8


def cases() -> Iterator[Case]:
    """Yields the cases; the quick cases cover each class of code."""
    for width in (576, 4096, 16384):
        yield norm_case(f"residual norm, {width} channels", width, quick=width == 4096)
    yield norm_case("residual norm, centred, float32", 640, centered=True, dtype="float32", quick=True)
    for group, dim in ((4, 128), (3, 64), (1, 80), (8, 256)):
        yield heads_case(f"heads, {group} queries, dim {dim}", group, dim, quick=group == 4)
    yield heads_case("heads with norms", 4, 128, norms=True, quick=True)
    yield heads_case("heads with norms, float32, dim 256", 4, 256, norms=True, dtype="float32")


def norm_case(name: str, width: int, *, centered: bool = False, dtype: str = "bfloat16", quick: bool = False) -> Case:
    """The sum and norm of a decoding step."""

    def run(hidden: Any, added: Any, scale: Any) -> Any:
        return norm.by_kernel(hidden, added, NormWeights(scale, 1e-5, centered), interpret=False)

    rows = jax.ShapeDtypeStruct((BATCH, 1, width), jnp.dtype(dtype))
    return Case(
        name, run, (rows, rows, jax.ShapeDtypeStruct((width,), jnp.dtype(dtype))), only=("residual_norm",), quick=quick
    )


def heads_case(
    name: str, group: int, dim: int, *, norms: bool = False, dtype: str = "bfloat16", quick: bool = False
) -> Case:
    """The heads of a decoding step, of two KV heads."""

    def run(joint: Any, cos: Any, sin: Any, scale: Any) -> Any:
        weights = NormWeights(scale, 1e-5) if norms else None
        return heads.by_kernel(heads.JointHeads(joint, (cos, sin), weights, weights), interpret=False)

    shape = jax.ShapeDtypeStruct
    factor = shape((BATCH, 1, dim // 2), jnp.float32)
    joint = shape((BATCH, 1, 2, group + 2, dim), jnp.dtype(dtype))
    return Case(name, run, (joint, factor, factor, shape((dim,), jnp.dtype(dtype))), only=("split_heads",), quick=quick)
