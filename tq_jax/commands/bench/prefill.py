"""Prefill attention: the last tokens of one or several long prompts, over packed pages."""

from collections.abc import Iterator

from pallas_kernels.attention import prefill_attention
from tq_jax.commands.bench.job import Job, Setting
from tq_jax.commands.bench.paged import MSE, Case, Operation
from tq_jax.commands.bench.shapes import PREFILL, SMALL

PREFILL_ATTENTION = Operation("prefill", prefill_attention, lambda case: 2e-3)


def cases() -> Iterator[Case]:
    """Yields the cases for a GPU."""
    for shape in PREFILL.values():
        for bits in (4, 3, 2):
            yield Case(shape, MSE[bits], MSE[bits])


def jobs(setting: Setting) -> Iterator[Job]:
    """Yields the measurements of prefill attention."""
    small = [Case(SMALL["prefill"], MSE[4], MSE[4], page_size=128)]
    return PREFILL_ATTENTION.jobs(list(cases()) if setting.gpu else small, setting)
