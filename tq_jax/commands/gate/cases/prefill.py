"""Cases of the prefill kernel, with the tiles of each kind of device: formats, head dims, masks and row counts."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from pallas_kernels.attention.prefill.launch_triton import attend_pages, config_for
from tq_jax.commands.gate.case import Case
from tq_jax.commands.gate.cases.decode import EVERYTHING, LARGE, Shape
from tq_jax.quantizer import QuantizerSpec

DEVICES = {"sm_90": ("sm_90",), "sm_100": ("sm_100",), "others": ("sm_80", "sm_86", "sm_89", "sm_120")}
"""Architectures of each kind of device; a kind has the same tiles."""

CHUNK = Shape(count=256)
"""What the arguments of a case are if it does not say."""


def cases() -> Iterator[Case]:
    """Yields the cases for every kind of device."""
    for kind in DEVICES:
        yield from cases_for(kind)


def cases_for(kind: str) -> Iterator[Case]:
    """Yields the cases for one kind of device; the quick cases cover each class of tiles and of code."""
    case = functools.partial(make_case, kind)
    spec = QuantizerSpec
    for bits in (1, 2, 3, 4, 8):
        yield case(f"K{bits}/V{bits}", spec(128, bits), spec(128, bits), quick=bits in (3, 4))
    for dim in (64, 80, 96, 192, 256):
        yield case(f"K4/V4 dim {dim}", spec(dim, 4), spec(dim, 4), quick=dim == 256)
    four, two = spec(128, 4), spec(128, 2, kind="group")
    yield case("K3.5/V2.5", spec(128, 3.5), spec(128, 2.5))
    yield case("prod 3, min-max 2", spec(128, 3, kind="prod"), two)
    for bits in (2, 3, 4):
        yield case(f"K{bits}/V{bits} in blocks", spec(128, bits), spec(128, bits), blocks=True, quick=bits == 4)
    yield case("pages of 16", four, four, page_size=16)
    yield case("pools of 3 GiB", four, four, pages=LARGE)
    yield case("min-max 4", four, spec(128, 4, kind="group"))
    for group, count in ((1, 256), (16, 64), (4, 9)):
        yield case(f"group {group}, {count} queries", four, four, group=group, count=count)
    yield case("window, soft-cap, bias", four, four, options=EVERYTHING, bias=True)


def make_case(
    kind: str,
    name: str,
    key: QuantizerSpec,
    value: QuantizerSpec,
    *,
    quick: bool = False,
    **shape: Any,
) -> Case:
    """Attention of a chunk over pages of two quantizers, on a kind of device, a key of DEVICES.

    The other arguments are those of `decode.cases_of`; `shape` holds fields that differ from CHUNK.
    """
    architectures = DEVICES[kind]
    arguments = dataclasses.replace(CHUNK, **shape).arguments(key, value)
    capability = int(architectures[0].removeprefix("sm_"))
    config = config_for(arguments.query.shape, arguments.pages, key.format, value.format, capability=capability)
    return Case(
        f"{name}, {kind}",
        functools.partial(attend_pages, config=config, interpret=False),
        (arguments,),
        config=f"{config.rows} rows, {config.tile} tokens, {config.num_warps} warps, {config.num_stages} stages",
        expected={"prefill": ("half mma",)},
        architectures=architectures,
        quick=quick,
    )
