"""`tq-jax serve-bench`: vLLM with this package's backend beside its own, each in a process of its own.

Importing this module needs neither torch nor vLLM, so that `tq-jax` can list the command without them.
"""

import dataclasses
import importlib.util
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from interop.vllm.serve_bench.choices import DEFAULT, FULL, Choice, parse_choices
from interop.vllm.serve_bench.engine import Job, steps_of_prompt
from interop.vllm.serve_bench.models import model_arguments
from interop.vllm.serve_bench.processes import run_engine
from tq_jax.commands.options import JsonTarget, parse_numbers, parse_object, picture_option
from tq_jax.commands.output import environment, open_console, progress_bar, write_json, write_partial

Row = dict[str, Any]

LONGER = 16
"""Tokens that a request may have beyond its prompt and its output."""

NAMES_OF_TYPES = {"bfloat16": FULL, "float16": "fp16", "float32": "fp32"}
"""Names in rows of the types of a cache in the model's own type."""


def serve_bench(
    model: Annotated[str | None, typer.Option(help="Directory or name of a model, as vLLM takes it.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="A published shape with random weights, as in `tq-jax bench model`.")
    ] = None,
    caches: Annotated[str, typer.Option(help="Caches to compare, comma-separated.")] = DEFAULT,
    options: Annotated[str, typer.Option(help="Further options of tq_jax, as JSON.")] = "{}",
    batch: Annotated[str, typer.Option(help="Requests at a time, comma-separated, or none.")] = "1,8",
    context: Annotated[str, typer.Option(help="Tokens of each prompt, comma-separated.")] = "8192,32768",
    output: Annotated[int, typer.Option(help="Tokens that each request generates.", min=8)] = 48,
    requests: Annotated[int, typer.Option(help="Requests of the throughput run; 0 leaves it out.", min=0)] = 0,
    together: Annotated[int, typer.Option(help="Of them, requests at a time.", min=1)] = 8,
    request_input: Annotated[int, typer.Option(help="Tokens of the prompt of each of them.", min=1)] = 20000,
    request_output: Annotated[int, typer.Option(help="Tokens that each of them generates.", min=1)] = 2000,
    served_s: Annotated[
        float, typer.Option(help="Seconds after which the throughput run is cut off.", min=0)
    ] = math.inf,
    fit: Annotated[
        int, typer.Option(help="Tokens of prompts of which as many as fit run together; 0 leaves them out.", min=0)
    ] = 0,
    fit_most: Annotated[int, typer.Option(help="Most of them.", min=1)] = 64,
    kv_gib: Annotated[float | None, typer.Option(help="Memory of the cache; by default what vLLM takes.")] = None,
    chunk: Annotated[int, typer.Option(help="Most tokens per step.", min=1)] = 8192,
    arguments: Annotated[str, typer.Option(help="Further arguments of vLLM's LLM, as JSON.")] = "{}",
    limit: Annotated[float, typer.Option(help="Seconds after which nothing is started.", min=0)] = math.inf,
    log: Annotated[Path, typer.Option(help="File to which vLLM's output is appended.")] = Path("serve-bench.log"),
    png: Annotated[Path | None, picture_option("time per step and capacity")] = None,
    json: JsonTarget = None,
) -> None:
    """Serve a model by vLLM with one KV cache after the other: start, prompts, steps, capacity, throughput.

    A cache is tq_jax:KEY_BITS/VALUE_BITS, turboquant:PRESET (vLLM's own), or a backend of vLLM such as flash_attn,
    triton_attn or auto, followed by a KV-cache type of vLLM where wanted: flash_attn:fp8. Each is an engine in a
    process of its own. A cache that vLLM does not offer for the model and device gets a row that says why.

    Exits 0 only if every cache was measured at every load.
    """
    console, started = open_console(json), time.time()
    choices, more = parse_choices(caches, parse_object(options, "--options")), parse_object(arguments, "--arguments")
    if importlib.util.find_spec("vllm") is None:
        raise typer.BadParameter('vLLM is not installed: pip install -e ".[vllm]" in a checkout of tq-jax')
    loads = [(b, c) for c in parse_numbers(context, int) for b in (parse_numbers(batch, int) if batch else ())]
    if min(map(min, loads), default=1) < 1:
        raise typer.BadParameter(f"expected batches and contexts of at least 1, got {batch!r} and {context!r}")
    with tempfile.TemporaryDirectory(prefix="serve-bench-model-") as folder:
        named = model_arguments(model, shape, Path(folder))
        plan = Job(
            {}, None, loads, output, requests, together, request_input, request_output, started + limit, fit, served_s
        )
        given = _arguments(plan, chunk, kv_gib, fit_most) | named | more
        jobs = [(c, dataclasses.replace(plan, arguments=given | c.arguments, attention=c.attention)) for c in choices]
        payload = {"model": model or shape, "kv_gib": kv_gib, "output": output, "arguments": given}
        rows: list[Row] = []
        for where in measure(jobs, rows, log, console):
            payload |= where
            write_partial(payload, rows, json)
    console.print(make_table(rows, f"{model or shape} on {payload.get('device')}"))
    if png is not None:
        from interop.vllm.serve_bench.picture import draw  # matplotlib is optional

        draw(rows, png, title=f"vLLM, {model or shape}, {payload.get('device')}")
    write_json(payload | {"rows": rows, "complete": True}, json)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def measure(
    jobs: Sequence[tuple[Choice, Job]], rows: list[Row], log: Path, console: Console
) -> Iterator[dict[str, Any]]:
    """Runs one engine after the other and adds its rows.

    Args:
        jobs: The caches and what to measure of each.
        rows: Rows so far; new ones are added.
        log: File to which the engines' output is appended.
        console: Where to show progress.

    Yields:
        After every new row, where figures come from: device, versions, commit.
    """
    where = environment(device="unknown device")
    with progress_bar(console) as progress:
        task = progress.add_task("", total=sum(1 + len(_measurements(job)) for _, job in jobs))
        for choice, job in jobs:
            progress.update(task, description=f"{choice.label}: starting")
            fields, missing, reason = choice.fields, _measurements(job), "not measured: the time of --limit was over"
            for result in run_engine(job, log) if time.time() < job.deadline else ():
                if said := result.get("progress"):
                    progress.update(task, description=f"{choice.label}: {said}")
                    continue
                progress.advance(task)
                reason = result.get("error", reason)
                if about := result.get("about"):
                    progress.update(task, description=choice.label)
                    found = environment(device=about.pop("device"))
                    where = found | {"versions": found["versions"] | about.pop("versions")}
                    kind = NAMES_OF_TYPES.get(about.pop("dtype"), FULL)
                    fields |= about | ({"kv": kind} if choice.kv == FULL else {})
                    yield where
                if row := result.get("row"):
                    missing = [known for known in missing if not known.items() <= row.items()]
                    rows.append(fields | row)
                    console.print(_line(rows[-1]), highlight=False, soft_wrap=True)
                    yield where
            rows += [fields | known | {"error": reason} for known in missing]
            if missing:
                console.print(_line(rows[-1]), highlight=False, soft_wrap=True)
            yield where


def make_table(rows: Sequence[Row], title: str) -> Table:
    """The figures as a table: a line per cache."""
    loads = list(dict.fromkeys((row["batch"], row["context"]) for row in rows if "batch" in row and "fit" not in row))
    more = {"fit": "as many as fit", "tokens_s": "tokens/s"}
    more = {key: name for key, name in more.items() if any(key in row for row in rows)}
    columns = ["cache", "start s", "tokens held", "of 32k", *(f"{b} x {c:,}" for b, c in loads), *more.values()]
    table = Table(*columns, title=f"{title}: ms per step (s per prompt)")
    for name in dict.fromkeys(map(_name, rows)):
        mine = [row for row in rows if _name(row) == name]
        cells = {(row["batch"], row["context"]): _cell(row) for row in mine if "batch" in row and "fit" not in row}
        figures = [_text(mine[0].get(key)) for key in ("start_s", "kv_tokens", "requests_32k")]
        last = [next((_figure(row) for row in mine if key in row), "-") for key in more]
        table.add_row(name, *figures, *(cells.get(load, "-") for load in loads), *last)
    return table


def _arguments(plan: Job, chunk: int, kv_gib: float | None, fit_most: int) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` that all caches share."""
    lengths = [context + plan.output for _, context in plan.loads]
    counts = [batch for batch, _ in plan.loads]
    if plan.requests:
        lengths, counts = [*lengths, plan.request_input + plan.request_output], [*counts, plan.together]
    if plan.fit:
        more = fit_most * steps_of_prompt(plan.fit, max(chunk, fit_most)) + plan.output
        lengths, counts = [*lengths, plan.fit + more], [*counts, fit_most]
    if not lengths:
        raise typer.BadParameter("expected something to measure, got no --batch, --requests or --fit")
    given: dict[str, Any] = {
        "max_model_len": max(lengths) + LONGER, "max_num_seqs": max(counts),
        "max_num_batched_tokens": max(chunk, *counts), "seed": 0, "enable_prefix_caching": False,
        "disable_log_stats": True, "skip_tokenizer_init": True, "generation_config": "vllm",
    }  # fmt: skip
    return given if kv_gib is None else given | {"kv_cache_memory_bytes": int(kv_gib * 2**30)}


def _measurements(job: Job) -> list[Row]:
    """The fields that name each measurement of a job."""
    loads: list[Row] = [{"batch": b, "context": c} for b, c in job.loads]
    loads += [{"fit": True, "context": job.fit}] if job.fit else []
    return loads + ([{"op": "vllm_throughput", "requests": job.requests}] if job.requests else [])


def _name(row: Row) -> str:
    return f"{row['backend']} {row['kv']}" + (f", window {row['window']}" if row["window"] else "")


def _cell(row: Row) -> str:
    return f"{row['decode_ms']:.2f} ({row['prefill_s']:.3g})" if "decode_ms" in row else "-"


def _text(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:,}"


def _figure(row: Row) -> str:
    """What a row of many requests found."""
    if "error" in row:
        return "-"
    if "fit" in row:
        return f"{row['batch']}: {row['decode_tokens_s']:,} tokens/s"
    return f"{row['tokens_s']:,}" + ("" if row["complete"] else " (cut off)")


def _line(row: Row) -> str:
    """One row for a log."""
    if "error" in row:
        return f"{_name(row)}: {row['error']}"
    if "fit" in row:
        return f"{_name(row)}, as many prompts of {row['context']:,} as fit: {_figure(row)}"
    if "batch" in row:
        return f"{_name(row)}, {row['batch']} x {row['context']:,}: {_cell(row)}"
    return f"{_name(row)}, {row['requests']} requests: {_figure(row)} tokens/s"
