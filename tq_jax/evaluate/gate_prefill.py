"""Prefill kernels to compile: formats, head dims, masks and row counts; not every combination."""

from collections.abc import Iterator

from pallas_kernels.decode import LogitOptions
from pallas_kernels.prefill.triton import attend_pages, config_for
from tq_jax.evaluate.gate import Case
from tq_jax.evaluate.gate_decode import EVERYTHING, PLAIN, paged_arguments, paged_function
from tq_jax.quantizer import QuantizerSpec


def cases() -> Iterator[Case]:
    """The cases; none is quick, as nearly all spill registers on some architecture."""
    spec = QuantizerSpec
    for bits in (1, 2, 3, 4, 8):
        yield case(f"K{bits}/V{bits}", spec(128, bits), spec(128, bits))
    for dim in (64, 80, 96, 192, 256):
        yield case(f"K4/V4 dim {dim}", spec(dim, 4), spec(dim, 4))
    four, two = spec(128, 4), spec(128, 2, kind="group")
    yield case("K3.5/V2.5", spec(128, 3.5), spec(128, 2.5))
    yield case("prod 3, min-max 2", spec(128, 3, kind="prod"), two)
    yield case("min-max 4", four, spec(128, 4, kind="group"))
    for group, count in ((1, 256), (16, 64), (4, 9)):
        yield case(f"group {group}, {count} queries", four, four, group=group, count=count)
    yield case("window, soft-cap, bias", four, four, options=EVERYTHING, bias=True)


def case(
    name: str,
    key: QuantizerSpec,
    value: QuantizerSpec,
    *,
    group: int = 4,
    count: int = 256,
    options: LogitOptions = PLAIN,
    bias: bool = False,
) -> Case:
    """Attention of a chunk over pages of two quantizers; arguments as in `gate_decode.case`."""
    arguments = paged_arguments(key, value, group=group, count=count, bias=bias)
    config = config_for(arguments[0].shape, arguments[1], value.format)
    return Case(
        name,
        paged_function(attend_pages, key, value, options=options, config=config),
        arguments,
        config=f"{config.rows} rows, {config.tile} tokens, {config.num_warps} warps, {config.num_stages} stages",
        expected={"prefill": ("half mma",)},
    )
