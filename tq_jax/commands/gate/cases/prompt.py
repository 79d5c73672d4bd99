"""Cases of the kernel of exact attention within a prompt: types, head dims, masks."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import LogitOptions, chunk_triton
from tq_jax.commands.gate.case import Case
from tq_jax.commands.gate.cases.decode import BATCH, EVERYTHING, KV_HEADS, PLAIN

TOKENS = 512


def cases() -> Iterator[Case]:
    """Yields the cases; the quick cases cover each class of code."""
    for dim in chunk_triton.DIMS:
        yield case(f"float32, dim {dim}", dim, "float32", PLAIN, quick=dim in (128, 256))
    yield case("bfloat16, dim 128, window, soft-cap", 128, "bfloat16", EVERYTHING, quick=True)
    yield case("float16, dim 80, window, soft-cap", 80, "float16", EVERYTHING)


def case(name: str, dim: int, dtype: str, options: LogitOptions, *, quick: bool = False) -> Case:
    """A prompt of TOKENS tokens with four query heads per KV head."""

    def run(query: Any, key: Any, value: Any) -> Any:
        return chunk_triton.attend_causal(query, key, value, options=options, interpret=False)

    query, key = (
        jax.ShapeDtypeStruct((BATCH, TOKENS, heads, dim), jnp.dtype(dtype)) for heads in (4 * KV_HEADS, KV_HEADS)
    )
    return Case(name, run, (query, key, key), quick=quick)
