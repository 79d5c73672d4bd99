"""Decode attention: few queries over packed pages."""

from collections.abc import Iterator

from pallas_kernels.decode import decode_attention
from tq_jax.bench.job import Job, Setting
from tq_jax.bench.paged import GROUP2, MSE, PROD3, Case, Operation
from tq_jax.bench.shapes import DECODE, SMALL

DECODE_ATTENTION = Operation("decode", decode_attention, tolerance=0.015)
"""One-byte queries and probabilities may add so much over thousands of random values, which nearly cancel."""


def cases() -> Iterator[Case]:
    """What is measured on a GPU; shapes in turn, so that a time limit cuts whole shapes."""
    for name in ("batch 8", "batch 32", "long", "single"):
        for bits in (4, 3, 2):
            yield Case(DECODE[name], MSE[bits], MSE[bits])
        if name == "batch 8":
            yield Case(DECODE[name], MSE[4], MSE[4], paged=False)
            yield Case(DECODE[name], PROD3, GROUP2)
            yield Case(DECODE["verify"], MSE[4], MSE[4])
            yield Case(DECODE[name], MSE[8], MSE[4])
    for name in ("dim 64", "dim 256"):
        yield Case(DECODE[name], MSE[4], MSE[4])


def jobs(setting: Setting) -> Iterator[Job]:
    """Measurements of decode attention."""
    small = [Case(SMALL["decode"], MSE[bits], MSE[bits], page_size=128) for bits in (4, 2)]
    return DECODE_ATTENTION.jobs(list(cases()) if setting.gpu else small, setting)
