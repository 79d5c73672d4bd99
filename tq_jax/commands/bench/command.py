"""`tq-jax bench`: time of the kernels, compared with the memory floor and with peers in the same process."""

import dataclasses
import importlib
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.table import Table

from tq_jax.commands.bench import claims, peers, timing
from tq_jax.commands.bench.job import Job, Row, Setting
from tq_jax.commands.options import JsonTarget, picture_option, require_known, require_labels
from tq_jax.commands.output import environment, open_console, progress_bar, write_json

OPS = {name: f"tq_jax.commands.bench.{name}" for name in ("decode", "attend", "encode", "prefill", "model", "search")}
"""Module of each operation's jobs."""

BY_DEFAULT = ["decode", "attend", "encode", "prefill"]
"""Operations that are measured if none is named."""

COPY_BYTES, MATRIX = {True: 2**30, False: 2**26}, {True: 8192, False: 512}
"""Sizes of the copy and of the matrix product that set the floor, with a GPU (True) and without (False)."""


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(help=f"Operations: {', '.join(OPS)}; by default {', '.join(BY_DEFAULT)}.")
    ] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which no further measurement starts.", min=0)] = 1e9,
    only: Annotated[str, typer.Option(help="Measure only what has this text in its label.")] = "",
    against: Annotated[str, typer.Option(help="Peers, comma-separated.")] = ",".join(p.name for p in peers.PEERS),
    png: Annotated[Path | None, picture_option("time against bytes")] = None,
    json: JsonTarget = None,
) -> None:
    """Time the kernels, and compare them with the floor that memory sets and with peers in the same process.

    On a GPU, measures production shapes with cold caches; every row is first compared with the reference. Without a
    GPU, small shapes run on the reference, and neither peers nor claims are measured. Figures are written after every
    row. Exits 0 only if all rows agree with the reference and the claims printed under the table hold.
    """
    started = time.monotonic()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers allocate on the same GPU
    console = open_console(json)
    chosen = require_known(ops or BY_DEFAULT, OPS, "operations")
    wanted = require_known(against.split(",") if against else [], [peer.name for peer in peers.PEERS], "peers")
    gpu = jax.default_backend() == "gpu"
    setting = make_setting(gpu, wanted, console)
    speeds = {"copy_gbps": setting.copy_gbps, "matmul_tflops": setting.matmul_tflops}
    data: dict[str, Any] = environment() | speeds | {"rows": [], "failed": [], "skipped": []}
    every = [(op, job) for op in chosen for job in importlib.import_module(OPS[op]).jobs(setting)]
    require_labels((job.label for _, job in every), only)
    jobs = [(op, job) for op, job in every if only in job.label]
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(jobs))
        for op, job in jobs:
            progress.update(task, description=job.label)
            if time.monotonic() - started > limit:
                data["skipped"].append(job.label)
            else:
                run(op, job, data, console)
            progress.advance(task)
            if json != "-":
                write_json(data, json)
    conclude(data, gpu=gpu, console=console)
    if png and data["rows"]:
        from tq_jax.commands.bench import roofline  # matplotlib is optional

        roofline.draw(data["rows"], png, copy_gbps=setting.copy_gbps, title=f"{data['device']}, jax {jax.__version__}")
        console.print(f"Picture: {png}")
    write_json(data, json)
    if not data["ok"]:
        raise typer.Exit(1)


def make_setting(gpu: bool, wanted: Sequence[str], console: Console) -> Setting:
    """Measures the copy and the matrix product, and finds the peers that can run; prints why the others cannot.

    Args:
        gpu: Whether JAX has a GPU.
        wanted: Names of the peers to compare with.
        console: Where to print.
    """
    setting = Setting(gpu, timing.copy_gbps(COPY_BYTES[gpu]), timing.matmul_tflops(MATRIX[gpu]))
    console.print(
        f"The floor of every row: a copy moves {setting.copy_gbps:.4g} GB/s, read plus written, and a bfloat16 matrix "
        f"product does {setting.matmul_tflops:.4g} tera-operations per second"
    )
    if not gpu:
        console.print("No NVIDIA GPU: small shapes run on the reference; peers and claims are not measured")
        return setting
    found = []
    for peer in (peer for peer in peers.PEERS if peer.name in wanted):
        if peer.missing:
            console.print(f"{peer.name} is not measured: {peer.missing}")
        else:
            found.append(peer)
    return dataclasses.replace(setting, peers=tuple(found))


def run(op: str, job: Job, data: dict[str, Any], console: Console) -> None:
    """Adds a job's rows to the data; a failure is recorded and ends only this job."""
    try:
        for row in job.run():
            data["rows"].append(row)
            floor = f", {row['us'] / row['floor_us']:.2f} of the floor" if row.get("floor_us") else ""
            error = f", error {row['error']:.1e}" if "error" in row else ""
            console.print(f"{job.label}: {row['us']} us{floor}{error}", highlight=False)
    except Exception as error:
        traceback.print_exc()
        data["failed"].append({"op": op, "label": job.label, "peer": job.peer, "error": repr(error)[:400]})
        console.print(f"{job.label}: FAILED, {repr(error)[:200]}", style="red", markup=False)


def conclude(data: dict[str, Any], *, gpu: bool, console: Console) -> None:
    """Adds ratios, claims and the verdict to the data, and prints the table and the claims."""
    rows = data["rows"]
    claims.add_ratios(rows)
    measured, missing = claims.measure(rows) if gpu else ([], [])
    data["claims"] = [claim.as_dict() for claim in measured]
    data["not_measured"] = missing
    own = [failure for failure in data["failed"] if not failure["peer"]]
    wrong = [row for row in rows if not row.get("ok", True)]
    data["ok"] = bool(rows) and not own and not wrong and all(claim.ok for claim in measured)
    console.print(make_table(rows, gpu=gpu))
    for claim in measured:
        verdict = "holds" if claim.ok else "FAILS"
        line = f"{verdict}  {claim.name} {claim.figure:.2f} ({claim.relation} {claim.bound:g})"
        console.print(line, style=None if claim.ok else "red", highlight=False)
    for row in wrong:
        console.print(f"WRONG  {row['op']} {row['key']}/{row['value']}: error {row['error']:.2e}", style="red")
    if missing:
        console.print(f"{len(missing)} claims were not measured")
    if data["skipped"]:
        console.print(f"{len(data['skipped'])} measurements did not start in time")


def make_table(rows: Sequence[Row], *, gpu: bool) -> Table:
    """The rows for a reader; columns that are empty in every row are left out.

    Args:
        rows: Rows as in the command's JSON.
        gpu: Whether times are times of GPU kernels.
    """
    cells = [_cells(row) for row in rows]
    names = [name for name in COLUMNS if any(line[name] for line in cells)]
    compared = " and speedup over peers" if {"cuDNN", "FlashInfer fp8"} & set(names) else ""
    kind, device = "GPU time" if gpu else "Wall-clock time", jax.devices()[0].device_kind
    table = Table(title=f"{kind} per call on {device}, in microseconds{compared}", title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in ("op", "impl", "shape", "codes") else "right")
    for line in cells:
        table.add_row(*(line[name] for name in names))
    return table


COLUMNS = ("op", "impl", "shape", "codes", "us", "end to end", "floor", "of floor", "cuDNN", "FlashInfer fp8")
"""Columns of the table, in order."""


def _cells(row: Row) -> dict[str, str]:
    """The text of a row in each column."""
    shape = f"{row['batch']} x {row['seq']}" if "seq" in row else str(row.get("batch", ""))
    usual = (("head_dim", 128), ("q_len", 1), ("capacity", None))
    shape += "".join(f", {name} {row[name]}" for name, value in usual if row.get(name, value) != value)
    codes = "/".join(row[x] for x in ("key", "value") if row.get(x)) + ("" if row.get("paged", True) else ", in order")
    faster = row.get("faster_than", {})
    return {
        "op": row["op"],
        "impl": row["impl"],
        "shape": shape,
        "codes": codes,
        "us": f"{row['us']:.1f}",
        "end to end": f"{row['end_to_end_us']:.1f}" if "end_to_end_us" in row else "",
        "floor": f"{row['floor_us']:.1f}" if "floor_us" in row else "",
        "of floor": f"{row['us'] / row['floor_us']:.2f}" if "floor_us" in row else "",
        "cuDNN": str(min((faster[name] for name in claims.CUDNN if name in faster), default="")),
        "FlashInfer fp8": str(faster.get("flashinfer_fp8", "")),
    }
