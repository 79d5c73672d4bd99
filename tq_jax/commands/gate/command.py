"""`tq-jax gate`: compile the kernels for six GPU generations, without a GPU."""

import importlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels.compat.compile import ARCHITECTURES, Compiled, compile_for, missing, version_note
from pallas_kernels.compat.lowering import TritonKernel
from tq_jax.commands.gate.case import Case
from tq_jax.commands.gate.cases import all_cases
from tq_jax.commands.options import JsonTarget, refusing, require_known, require_labels
from tq_jax.commands.output import environment, open_console, progress_bar, write_json

MOST_REGISTERS = 255
"""Registers that a thread can have."""
FAILURES_NAMED = 8
"""Most kernels that the last line names."""


def make_row(op: str, case: Case, kernel: TritonKernel, architecture: str, job: Future[Compiled]) -> dict[str, Any]:
    """One row of the report; if the kernel does not compile, the row has the error."""
    row: dict[str, Any] = {
        "kernel": f"{op} {case.name}" + (f": {kernel.name}" if kernel.name != op else ""),
        "config": case.config or f"{kernel.num_warps} warps, {kernel.num_stages} stages",
        "arch": architecture,
    }
    if error := job.exception():
        return row | {"error": repr(error)[:400], "ok": False}
    compiled = job.result()
    lacking = missing(compiled, case.expected.get(kernel.name, ()))
    fits = compiled.registers <= MOST_REGISTERS and not compiled.stack_bytes
    return row | {
        "registers": compiled.registers,
        "spill_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes,
        "instructions": compiled.instructions,
        "missing": lacking,
        "ok": fits and not lacking,
    }


def gate(
    arch: Annotated[str, typer.Option(help="Architectures, comma-separated.")] = ",".join(ARCHITECTURES),
    only: Annotated[str, typer.Option(help="Compile every kernel whose name contains this text, and no other.")] = "",
    full: Annotated[bool, typer.Option("--full", help="Compile every case instead of one of each class.")] = False,
    workers: Annotated[int, typer.Option(help="Compilers that run at once; one per core by default.", min=0)] = 0,
    xla: Annotated[bool, typer.Option("--xla", help="Let XLA compile whole operations for an H100 instead.")] = False,
    json: JsonTarget = None,
) -> None:
    """Compile the GPU kernels for six GPU generations, without a GPU.

    Exits 0 only if each kernel compiles without spilling registers and contains the tensor-core, lookup and
    asynchronous-copy instructions that it needs; with --xla, only if no kernel spills more than is known and no
    operation copies the cache. Needs the triton package, or with --xla the CUDA wheels of JAX.
    """
    architectures = require_known(arch.split(","), ARCHITECTURES, "architectures")
    if xla and (only or full):
        raise typer.BadParameter("--xla always compiles the same cases: expected neither --only nor --full")
    console = open_console(json)
    if xla:
        rows = compile_by_xla()
        verdict = "spill no more than is known and copy nothing of the cache"
    else:
        with refusing("gate"):
            version = importlib.import_module("triton").__version__
        every = [(op, case) for op, case in all_cases() if set(architectures) & set(case.architectures)]
        require_labels((f"{op} {case.name}" for op, case in every), only)
        cases = [(op, case) for op, case in every if only in f"{op} {case.name}"]
        chosen = [(op, case) for op, case in cases if full or only or case.quick]
        rows = compile_cases(chosen, architectures, workers or os.cpu_count(), console)
        console.print(f"{len(chosen)} of {len(cases)} cases; --full compiles all")
        console.print(f"Compiled by triton {version}: {version_note(version)}", soft_wrap=True)
        verdict = "compile as they should"
    console.print(make_table(rows))
    console.print(summarize(rows, verdict), soft_wrap=True, markup=False)
    write_json(environment() | {"rows": rows}, json)
    if not rows or not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def summarize(rows: Sequence[dict[str, Any]], verdict: str) -> str:
    """The last line: how many rows are as they should be, and which kernels are not on which architectures.

    Args:
        rows: What `make_row` makes.
        verdict: What rows do that are as they should be.

    Example:
        >>> rows = [{"kernel": "encode V4", "arch": arch, "ok": arch == "sm_80"} for arch in ("sm_80", "sm_90")]
        >>> summarize(rows, "compile as they should")
        '1 of 2 compile as they should; these do not: encode V4 (sm_90)'
    """
    failing: dict[str, list[str]] = {}
    for row in rows:
        if not row["ok"]:
            failing.setdefault(row["kernel"], []).append(row["arch"])
    said = f"{sum(row['ok'] for row in rows)} of {len(rows)} {verdict}"
    if not failing:
        return said
    named = [f"{kernel} ({', '.join(architectures)})" for kernel, architectures in failing.items()]
    more = f"; and {len(named) - FAILURES_NAMED} more kernels" if len(named) > FAILURES_NAMED else ""
    return f"{said}; these do not: {'; '.join(named[:FAILURES_NAMED])}{more}"


def compile_by_xla() -> list[dict[str, Any]]:
    """Rows of whole operations, compiled by XLA.

    Raises:
        typer.BadParameter: If the wheels for CUDA are not installed.
    """
    from tq_jax.commands.gate import xla

    if needed := xla.missing():
        raise typer.BadParameter(f"nothing compiled: XLA needs its wheels for CUDA: {needed}")
    return xla.compile_all()


def compile_cases(
    cases: Sequence[tuple[str, Case]], architectures: Sequence[str], workers: int | None, console: Console
) -> list[dict[str, Any]]:
    """Compiles the kernels of the cases for every architecture, in several processes, and returns their rows."""
    rows, seen = [], set()
    # Processes are spawned, because neither JAX nor MLIR survives a fork.
    context = multiprocessing.get_context("spawn")
    with progress_bar(console) as progress, ProcessPoolExecutor(workers, mp_context=context) as pool:
        task = progress.add_task("compiling", total=None)
        jobs = {}
        for op, case in cases:
            wanted = [name for name in architectures if name in case.architectures]
            for kernel in case.lower() if wanted else ():
                for name in wanted:
                    # The kernels around an operation's main kernel are the same in many cases.
                    if (kernel, name) not in seen:
                        seen.add((kernel, name))
                        jobs[pool.submit(compile_for, kernel, name)] = op, case, kernel, name
        progress.update(task, total=len(jobs))
        for job in as_completed(jobs):
            op, case, kernel, name = jobs[job]
            rows.append(make_row(op, case, kernel, name, job))
            progress.advance(task)
    return sorted(rows, key=lambda row: (row["kernel"], ARCHITECTURES.index(row["arch"])))


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a reader."""
    table = Table(title="GPU kernels, compiled", title_justify="left")
    words, numbers = ("kernel", "config", "arch"), ("registers", "spill_bytes", "shared_bytes")
    for column in (*words, *numbers, "fault"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for row in rows:
        faults = [f"no {name}" for name in row.get("missing", ())] + [f"copies {x}" for x in row.get("copies", ())]
        fault = row.get("error") or " ".join(faults)
        texts = [str(row.get(name, "")) for name in (*words, *numbers)]
        table.add_row(*texts, fault, style=None if row["ok"] else "red")
    return table
