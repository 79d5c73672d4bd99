"""The kernels that `tq-jax gate` compiles, as functions that launch them: one module per operation."""

import importlib
from collections.abc import Iterator

from tq_jax.commands.gate.case import Case

OPERATIONS = ("decode", "prefill", "dequantize", "encode", "append", "attend", "prompt", "layer")
"""Modules of this package whose `cases()` are compiled."""


def all_cases() -> Iterator[tuple[str, Case]]:
    """Yields every case with the name of its operation."""
    for op in OPERATIONS:
        for case in importlib.import_module(f"tq_jax.commands.gate.cases.{op}").cases():
            yield op, case
