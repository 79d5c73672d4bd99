"""Decode attention: few queries over packed pages."""

from collections.abc import Iterator

from pallas_kernels.attention import decode_attention
from pallas_kernels.attention.decode.config import has_pairs
from tq_jax.codebook import codebook, distortion
from tq_jax.commands.bench.job import Job, Setting
from tq_jax.commands.bench.paged import GROUP2, MSE, PROD3, Case, Operation
from tq_jax.commands.bench.shapes import DECODE, SMALL


def tolerance(case: Case) -> float:
    """Largest relative error of the kernel: with one-byte queries, a tenth of the error of the codes."""
    shape = case.shape
    if has_pairs(shape.q_len * shape.q_heads // shape.kv_heads, dim=shape.head_dim):
        return 1e-3
    return 0.1 * sum(distortion(codebook(spec.dim, int(spec.bits))) for spec in case.specs) ** 0.5


DECODE_ATTENTION = Operation("decode", decode_attention, tolerance)


def cases() -> Iterator[Case]:
    """Yields the cases for a GPU, sorted by shape, so that a time limit cuts whole shapes."""
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
    """Yields the measurements of decode attention."""
    small = [Case(SMALL["decode"], MSE[bits], MSE[bits], page_size=128) for bits in (4, 2)]
    return DECODE_ATTENTION.jobs(list(cases()) if setting.gpu else small, setting)
