"""Cases of the kernel that reads pages as dense tokens: formats, head dims and layouts of pages."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dequantize import DequantizeArguments
from pallas_kernels.dequantize.launch_triton import dequantize_pages
from tq_jax.commands.gate.case import Case
from tq_jax.commands.gate.cases.decode import BATCH, KV_HEADS, Shape
from tq_jax.quantizer import QuantizerSpec

TOKENS = 16384
"""Tokens of the result."""

ARCHITECTURES = ("sm_90",)
"""Where the tiles hold a matrix in shared memory; those of other devices are still to be chosen."""


def cases() -> Iterator[Case]:
    """Yields the cases; the quick cases cover each class of code."""
    spec = QuantizerSpec
    for bits in (1, 2, 3, 4, 8):
        yield case(f"K{bits}/V{bits}", spec(128, bits), spec(128, bits), quick=bits in (3, 4, 8))
    for dim in (64, 80, 96, 192, 256):
        yield case(f"K4/V3 dim {dim}", spec(dim, 4), spec(dim, 3), quick=dim in (80, 256))
    four, two = spec(128, 4), spec(128, 2, kind="group")
    yield case("K3.5/V2.5", spec(128, 3.5), spec(128, 2.5))
    yield case("prod 3, min-max 2", spec(128, 3, kind="prod"), two, quick=True)
    yield case("min-max 4", four, spec(128, 4, kind="group"))
    yield case("pages of 16", four, four, page_size=16)
    yield case("blocks of 64, centred", four, four, page_size=64, blocks=True, centred=True, quick=True)


def case(
    name: str, key: QuantizerSpec, value: QuantizerSpec, *, centred: bool = False, quick: bool = False, **shape: Any
) -> Case:
    """Dense tokens of pages of two quantizers.

    Args:
        name: What distinguishes the case.
        key: Key quantizer.
        value: Value quantizer.
        centred: Whether keys have a mean and weights.
        quick: Whether the case is compiled by default.
        **shape: Fields of `decode.Shape`.
    """
    paged = Shape(**shape).arguments(key, value)
    struct: Any = jax.ShapeDtypeStruct
    coordinates = key.dim * (2 if key.kind == "prod" else 1)
    statistics = struct((BATCH, KV_HEADS, key.dim), jnp.float32) if centred else None
    arguments = DequantizeArguments(
        paged.pages,
        struct((coordinates, key.dim), jnp.float16),
        struct((value.dim, value.dim), jnp.float16),
        paged.block_table,
        paged.lengths,
        paged.lengths,
        struct((KV_HEADS,), jnp.int32),
        key_format=key.format,
        value_format=value.format,
        mean=statistics,
        weight=statistics,
    )
    run = functools.partial(dequantize_pages, tokens=TOKENS, dtype=jnp.bfloat16, interpret=False)
    names: tuple[str, ...] = ("dequantize_keys", "dequantize_values")
    expected: dict[str, tuple[str, ...]] = dict.fromkeys(names, ("half mma",))
    return Case(name, run, (arguments,), expected=expected, only=names, architectures=ARCHITECTURES, quick=quick)
