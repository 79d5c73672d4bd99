"""The measurements of `tq-jax bench model`, in order."""

import functools
from collections.abc import Iterator

from tq_jax.commands.bench.job import Job, Row, Setting
from tq_jax.commands.bench.model import fit, lab
from tq_jax.commands.bench.model.caches import Kind
from tq_jax.commands.bench.model.plan import Plan, Task, by_shape


def jobs(setting: Setting, plan: Plan) -> Iterator[Job]:
    """Yields the measurements of one decoder after the other, so that weights are made once.

    Args:
        setting: The device, and its speeds in this run.
        plan: What to measure.
    """
    bench, where = lab.Lab(setting, plan), plan.placement.label
    for shape, tasks in by_shape(plan):
        for task in tasks:
            yield Job(task.label + where, functools.partial(_run, bench, task))
        for kind in plan.kinds if plan.check_fit else ():
            yield Job(f"fit {shape}, {kind.label}{where}", functools.partial(_check_fit, bench, shape, kind))


def _run(bench: lab.Lab, task: Task) -> Iterator[Row]:
    yield bench.attempt(task)


def _check_fit(bench: lab.Lab, shape: str, kind: Kind) -> Iterator[Row]:
    """Decodes with the largest batch and with the longest context that are computed to fit."""
    limit = lab.memory_stats().get("bytes_limit")
    config = bench.plan.configs[shape]
    devices = bench.plan.placement.devices
    for found in fit.compute(bench.rows, {shape: config}, (kind,), limit, devices=devices) if limit else ():
        for batch, seq in ((found["batch"], found["batch_seq"]), (1, found["context"])):
            if batch and seq > bench.plan.steps:
                row = bench.attempt(Task("fit", shape, batch, seq, kind))
                yield row | {"fits": None if "error" in row and not row["out_of_memory"] else "us" in row}
