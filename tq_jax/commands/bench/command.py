"""`tq-jax bench`: time of the kernels, compared with the memory floor and with peers in the same process."""

import dataclasses
import importlib
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.table import Table

from tq_jax.commands.bench import claims, peers, timing
from tq_jax.commands.bench.job import Job, Row, Setting
from tq_jax.commands.bench.model import claims as model_claims
from tq_jax.commands.bench.model import plan as planning
from tq_jax.commands.bench.model import report
from tq_jax.commands.claims import Claim
from tq_jax.commands.options import JsonTarget, picture_option, require_known, require_labels
from tq_jax.commands.output import environment, open_console, progress_bar, write_json

OPS = {name: f"tq_jax.commands.bench.{name}" for name in ("decode", "attend", "encode", "prefill", "search")}
OPS["model"] = "tq_jax.commands.bench.model.jobs"
"""Module of each operation's jobs."""

BY_DEFAULT = ["decode", "attend", "encode", "prefill"]
"""Operations that are measured if none is named."""

COPY_BYTES, MATRIX = {True: 2**30, False: 2**26}, {True: 8192, False: 512}
"""Sizes of the copy and of the matrix product that set the floor, with a GPU (True) and without (False)."""

WHOLE_FRACTION = "0.95"
"""Share of the GPU's memory that JAX takes if only whole models are measured."""

LABELS_SHOWN = 6
"""Most measurements that did not start which are named."""


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(help=f"Operations: {', '.join(OPS)}; by default {', '.join(BY_DEFAULT)}.")
    ] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which no further measurement starts.", min=0)] = 1e9,
    only: Annotated[str, typer.Option(help="Measure only what has this text in its label.")] = "",
    against: Annotated[str, typer.Option(help="Peers, comma-separated.")] = ",".join(p.name for p in peers.PEERS),
    png: Annotated[Path | None, picture_option("time against bytes, of whole models against context")] = None,
    json: JsonTarget = None,
    shape: planning.ShapeNames = None,
    model: planning.ModelFile = None,
    context: planning.Contexts = None,
    batch: planning.Batches = None,
    cache: planning.Caches = None,
    prompt: planning.Prompts = None,
    many: planning.Many = None,
    steps: planning.Steps = None,
    capacity: planning.Capacity = None,
    fill: planning.Fill = planning.FILLS[0],
    check_fit: planning.CheckFit = False,
    mesh: planning.Mesh = None,
) -> None:
    """Time the kernels, and compare them with the floor that memory sets and with peers in the same process.

    On a GPU, measures production shapes with cold caches; every row is first compared with the reference. Without a
    GPU, small shapes run on the reference, and neither peers nor claims are measured. Figures are written after every
    row. The operation model times whole decoders: tokens of the compiled loop behind caches of many sizes, prompts, and
    what fits the device. Exits 0 only if all rows agree with the reference and the claims printed under the table hold.
    """
    started = time.monotonic()
    console = open_console(json)
    chosen = require_known(ops or BY_DEFAULT, OPS, "operations")
    set_memory(chosen)
    wanted = require_known(against.split(",") if against else [], [peer.name for peer in peers.PEERS], "peers")
    gpu = jax.default_backend() == "gpu"
    asked = planning.Asked(shape, model, context, batch, cache, prompt, many, steps, capacity, fill, check_fit, mesh)
    plan = make_plan(chosen, asked, gpu=gpu)
    setting = make_setting(gpu, wanted if set(chosen) != {"model"} else [], console)
    speeds = {"copy_gbps": setting.copy_gbps, "matmul_tflops": setting.matmul_tflops}
    data: dict[str, Any] = environment() | speeds | {"rows": [], "failed": [], "skipped": []}
    every = list(list_jobs(chosen, setting, plan))
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
    conclude(data, gpu=gpu, console=console, plan=plan)
    if png:
        draw(data, png, setting, console)
    write_json(data, json)
    if not data["ok"]:
        raise typer.Exit(1)


def set_memory(chosen: Sequence[str]) -> None:
    """Lets peers allocate on the GPU beside JAX; whole models, which have no peers, get nearly all of it in one piece.

    What the environment says already counts before that. JAX must not have started yet.

    Args:
        chosen: Operations to measure.
    """
    if set(chosen) == {"model"}:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", WHOLE_FRACTION)
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def make_plan(chosen: Sequence[str], asked: planning.Asked, *, gpu: bool) -> planning.Plan | None:
    """The plan of the operation model; None if it is not chosen.

    Args:
        chosen: Operations to measure.
        asked: Options of the operation model.
        gpu: Whether JAX has a GPU.

    Raises:
        typer.BadParameter: If an option is wrong, or given without the operation.
    """
    if "model" in chosen:
        return planning.make_plan(asked, gpu=gpu)
    if asked.given():
        raise typer.BadParameter(
            f"expected {', '.join(asked.given())} with the operation model, got operations {', '.join(chosen)}"
        )
    return None


def list_jobs(chosen: Sequence[str], setting: Setting, plan: planning.Plan | None) -> Iterator[tuple[str, Job]]:
    """Yields the measurements of all operations, in order, each with its operation.

    Args:
        chosen: Operations to measure.
        setting: The device, and the peers.
        plan: The plan of the operation model, if it is chosen.
    """
    for op in chosen:
        module = importlib.import_module(OPS[op])
        yield from ((op, job) for job in (module.jobs(setting, plan) if op == "model" else module.jobs(setting)))


def draw(data: dict[str, Any], path: Path, setting: Setting, console: Console) -> None:
    """Draws the rows; whole models have a picture of their own, beside that of kernels if there are both.

    Args:
        data: The command's JSON.
        path: The file; its suffix sets the format.
        setting: The device.
        console: Where to say what was drawn.
    """
    from tq_jax.commands.bench import roofline  # matplotlib is optional
    from tq_jax.commands.bench.model import picture

    title = f"{data['device']}, jax {jax.__version__}"
    kernels, whole = split_rows(data["rows"])
    if kernels:
        roofline.draw(kernels, path, copy_gbps=setting.copy_gbps, title=title)
        console.print(f"Picture: {path}")
    if any(row["op"] == "model" and "us" in row for row in whole):
        path = path.with_stem(f"{path.stem}_model") if kernels else path
        picture.draw(whole, data["published_lines"], path, title=title)
        console.print(f"Picture: {path}")


def split_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of kernels and those of whole models.

    Args:
        rows: All rows.
    """
    kernels, whole = ([row for row in rows if (row["op"] in report.OPS) == is_whole] for is_whole in (False, True))
    return kernels, whole


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
    failed = {"op": op, "label": job.label, "peer": job.peer}
    try:
        for row in job.run():
            data["rows"].append(row)
            if row["op"] in report.OPS:
                text, known = report.tell(row), "error" not in row
                if not known and not row["out_of_memory"]:
                    data["failed"].append(failed | {"error": row["error"]})
                console.print(f"{job.label}: {text}", style=None if known else "red", highlight=False, markup=False)
                continue
            floor = f", {row['us'] / row['floor_us']:.2f} of the floor" if row.get("floor_us") else ""
            error = f", error {row['error']:.1e}" if "error" in row else ""
            console.print(f"{job.label}: {row['us']} us{floor}{error}", highlight=False)
    except Exception as error:
        traceback.print_exc()
        data["failed"].append(failed | {"error": repr(error)[:400]})
        console.print(f"{job.label}: FAILED, {repr(error)[:200]}", style="red", markup=False)


def conclude(data: dict[str, Any], *, gpu: bool, console: Console, plan: planning.Plan | None = None) -> None:
    """Adds ratios, claims and the verdict to the data, and prints the tables and the claims."""
    rows, whole = split_rows(data["rows"])
    claims.add_ratios(rows)
    measured, missing = claims.measure(rows, data["device"]) if gpu and (rows or not plan) else ([], [])
    if rows or not plan:
        console.print(make_table(rows, gpu=gpu))
    if plan:
        report.add_summary(data, plan)
        report.show(data, console)
        found, lacking = model_claims.measure(whole, data["device"])
        measured, missing = measured + found, missing + lacking
    data["claims"] = [claim.as_dict() for claim in measured]
    data["not_measured"] = missing
    own = [failure for failure in data["failed"] if not failure["peer"]]
    wrong = [row for row in rows if not row.get("ok", True)]
    figures = rows + [row for row in whole if "error" not in row]
    data["ok"] = bool(figures) and not own and not wrong and all(claim.ok for claim in measured)
    print_verdicts(data, measured, console)


def print_verdicts(data: dict[str, Any], measured: Sequence[Claim], console: Console) -> None:
    """Prints which claims hold, which rows are wrong, and what was left out.

    Args:
        data: The command's JSON.
        measured: Claims whose rows were measured.
        console: Where to print.
    """
    for claim in measured:
        verdict = "holds" if claim.ok else "FAILS"
        line = f"{verdict}  {claim.name} {claim.figure:.2f} ({claim.relation} {claim.bound:g})"
        console.print(line, style=None if claim.ok else "red", highlight=False)
    for row in (row for row in split_rows(data["rows"])[0] if not row.get("ok", True)):
        console.print(f"WRONG  {row['op']} {row['key']}/{row['value']}: error {row['error']:.2e}", style="red")
    if data["not_measured"]:
        console.print(f"{len(data['not_measured'])} claims were not measured")
    if data["skipped"]:
        some = "; ".join(data["skipped"][:LABELS_SHOWN]) + ("; ..." if len(data["skipped"]) > LABELS_SHOWN else "")
        console.print(f"{len(data['skipped'])} measurements did not start in time: {some}", markup=False)


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
    usual = (("head_dim", 128), ("q_len", 1))
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
