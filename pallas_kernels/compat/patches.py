"""What Pallas Triton lacks up to jax 0.12: offsets of 64 bits, and inline PTX with several results.

Importing this module puts the offsets in place for every kernel of the process; `pallas_kernels` does so.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend
from jax._src.pallas.triton import lowering as triton_lowering
from jax._src.pallas.triton import primitives as triton_primitives

_narrow_offsets = triton_lowering._compute_offsets_from_indices


def _compute_offsets(block_info: Any, indexer: Any) -> Any:
    """Pallas's offsets of a tile's elements, of 64 bits from 2**31 elements on.

    Up to jax 0.12 it takes 32 bits for arrays of up to 2**32 bytes, and Triton has them signed.
    """
    whole = block_info.full_shape_dtype
    if math.prod(whole.shape) > 2**31:
        # The first axis has no part in strides, so that an array that is longer is addressed alike.
        longer = jax.ShapeDtypeStruct((2**33, *whole.shape[1:]), whole.dtype)
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
    """Pallas Triton's `elementwise_inline_asm`, which up to jax 0.11 lowers one result only, with several.

    Args:
        text: Instructions.
        constraints: Of results and arguments, as LLVM has them.
        x: Arguments, tiles of one shape.
        result_types: Types of the results.
    """
    types = tuple(jax.numpy.dtype(kind) for kind in result_types)
    return _assembly_p.bind(*x, asm=text, constraints=constraints, pack=1, result_types=types)
