"""Which kernels `tq-jax gate` compiles: functions that launch Pallas Triton kernels, a module per operation."""

import importlib
from collections.abc import Iterator

from tq_jax.commands.gate.case import Case

OPERATIONS = ("decode", "prefill", "encode", "append", "attend")
"""Modules of this package whose `cases()` are compiled."""


def all_cases() -> Iterator[tuple[str, Case]]:
    """Every case with its operation."""
    for op in OPERATIONS:
        for case in importlib.import_module(f"tq_jax.commands.gate.cases.{op}").cases():
            yield op, case
