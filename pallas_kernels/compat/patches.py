"""Additions to Pallas Triton up to jax 0.12: offsets of 64 bits, and inline PTX with several results.

Importing this module puts the offsets in place for every kernel of the process; `pallas_kernels` imports it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend
from jax._src.pallas.triton import lowering as triton_lowering
from jax._src.pallas.triton import primitives as triton_primitives

MOST_NARROW, WIDE = 2**31, 2**33
"""Elements of an array whose offsets fit 32 bits with a sign; a size for which Pallas takes 64 bits."""

_narrow_offsets = triton_lowering._compute_offsets_from_indices


def _compute_offsets(block_info: Any, indexer: Any) -> Any:
    """Pallas's offsets of a tile's elements, of 64 bits for arrays of more than MOST_NARROW elements.

    Up to jax 0.12, Pallas takes 32 bits for arrays of up to 2**32 bytes, and Triton reads them as signed.
    """
    whole = block_info.full_shape_dtype
    if math.prod(whole.shape) > MOST_NARROW:
        # Strides do not depend on the first axis, so that offsets into a longer array are the same.
        longer = jax.ShapeDtypeStruct((WIDE, *whole.shape[1:]), whole.dtype)
        block_info = dataclasses.replace(block_info, full_shape_dtype=longer)
    return _narrow_offsets(block_info, indexer)


triton_lowering._compute_offsets_from_indices = _compute_offsets


_assembly_p = jax.extend.core.Primitive("assembly")
_assembly_p.multiple_results = True


@_assembly_p.def_abstract_eval
def _assembly_types(*x: Any, result_types: tuple[Any, ...], **_: Any) -> list[Any]:
    return [x[0].update(dtype=dtype) for dtype in result_types]


@triton_lowering.register_lowering(_assembly_p)
def _lower_assembly(context: Any, *x: Any, result_types: tuple[Any, ...], **options: Any) -> list[Any]:
    lower: Any = triton_primitives._elementwise_inline_asm_lowering  # pyright: ignore[reportAttributeAccessIssue]
    [results] = lower(context, *x, result_shape_dtypes=result_types, **options)
    return list(results) if len(result_types) > 1 else [results]


def elementwise_assembly(
    text: str, constraints: str, x: Sequence[jax.Array], result_types: Sequence[Any]
) -> list[jax.Array]:
    """Pallas Triton's `elementwise_inline_asm` with any number of results; up to jax 0.11 it lowers one only.

    Args:
        text: PTX instructions.
        constraints: Constraints of results and arguments, in LLVM's notation.
        x: Arguments, tiles of one shape.
        result_types: Types of the results.

    Returns:
        The results, in the shape of the arguments.
    """
    types = tuple(jax.numpy.dtype(kind) for kind in result_types)
    return _assembly_p.bind(*x, asm=text, constraints=constraints, pack=1, result_types=types)
