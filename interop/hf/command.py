"""`tq-jax hf`: compares a Hugging Face model's usual cache with compressed ones by text, KL, bytes and time.

Importing this module needs neither torch nor transformers, so that `tq-jax` can list the command without them.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tq_jax.commands.inputs import read_text
from tq_jax.commands.options import JsonTarget, TextFile, parse_bits, refusing
from tq_jax.commands.output import environment, open_console, progress_bar, write_json
from tq_jax.data import persuasion

if TYPE_CHECKING:
    from interop.hf.measure import Row

DEFAULT_BITS = "4/4,3/3"

QUESTION = "Describe in detail what you see."
"""The question about images and videos if there is no prompt."""


def hf(
    context_of_call: typer.Context,
    model: Annotated[Path, typer.Argument(help="Directory of a Hugging Face model.", exists=True, file_okay=False)],
    prompt: Annotated[
        str | None, typer.Option(help="What to continue, or the question about what is shown; by default, the text.")
    ] = None,
    text: TextFile = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image to ask about.", exists=True, dir_okay=False)
    ] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video to ask about.", exists=True, dir_okay=False)] = None,
    bits: Annotated[str, typer.Option(help="Key/value bits of each compressed cache, comma-separated.")] = DEFAULT_BITS,
    context: Annotated[int, typer.Option(help="Tokens of the text before the predictions compared.", min=1)] = 512,
    positions: Annotated[int, typer.Option(help="Number of predictions compared.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 32,
    device: Annotated[str, typer.Option(help="Device on which torch runs the model.")] = "cpu",
    graphs: Annotated[bool, typer.Option("--graphs", help="Decode with compressed caches by CUDA graphs.")] = False,
    json: JsonTarget = None,
) -> None:
    """Compare a Hugging Face model's usual cache with compressed ones: text, KL, bytes, time.

    Runs the model in transformers with DynamicCache and its own attention, then with TurboQuantCache, on the same text
    and prompt; with --image or --video, on a question about them, and compares the predictions along the usual cache's
    answer. Exits 0 only if every compressed cache is smaller than the usual one and every divergence is a number.
    """
    widths = parse_bits(bits)
    shown: list[Any] = [("image", path) for path in image or ()] + [("video", path) for path in video or ()]
    if shown:
        require_unset(context_of_call, "text", "context", "positions", "graphs")
    content = read_text(text) if text else persuasion()
    with refusing("torch,hf"):
        from interop.hf import measure, measure_vision
    console = open_console(json)
    if shown:
        job = measure_vision.load_task(model, shown, prompt or QUESTION, new_tokens=new_tokens, device=device)
        measured = measure_vision.measure
    else:
        job = measure.load_task(
            model, content, prompt,
            context=context, positions=positions, new_tokens=new_tokens, device=device, graphs=graphs,
        )  # fmt: skip
        measure.require_supported(job, widths)
        measured = measure.measure
    rows = _measure_all(measured, job, widths, console)
    holds = all(row.nbytes < rows[0].nbytes and math.isfinite(row.kl_mean) for row in rows[1:])
    dtype = str(job.network.dtype).removeprefix("torch.")
    console.print(make_table(rows, f"{dtype} with {job.attention}"))
    for row in rows:
        console.print(f"[bold]{row.cache:>8}[/bold]  {row.text!r}")
    payload: dict[str, Any] = {"model": str(model), "dtype": dtype, "attention": job.attention}
    payload |= {"graphs": graphs, "positions": job.positions, "holds": holds}
    payload |= {"shown": [{kind: str(path)} for kind, path in shown]}
    payload |= {"rows": [dataclasses.asdict(row) for row in rows], "environment": environment()}
    write_json(payload | {"peers": measure.versions()}, json)
    raise typer.Exit(0 if holds else 1)


def _measure_all(measured: Any, job: Any, widths: Sequence[Any], console: Console) -> list["Row"]:
    """The measurements of the usual cache and of every compressed one."""
    reference, rows = None, []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(widths) + 1)
        for pair in (None, *widths):
            progress.update(task, description="baseline" if pair is None else f"K{pair[0]:g}/V{pair[1]:g}")
            reference, row = measured(job, pair, reference)
            rows.append(row)
            progress.advance(task)
    return rows


def require_unset(call: typer.Context, *names: str) -> None:
    """Raises typer.BadParameter for options that have no meaning beside --image and --video."""
    for name in names:
        source = call.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"expected no --{name} with --image or --video, which are asked about alone")


def make_table(rows: list["Row"], baseline: str) -> Table:
    """The figures as a table; ratio is the bytes of the usual cache per byte of the compressed one."""
    table = Table(title=f"DynamicCache in {baseline} against TurboQuantCache")
    for name in ("cache", "layers", "MiB", "ratio", "KL", "KL max", "same top-1", "ms per token"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in rows:
        table.add_row(
            row.cache, str(row.layers), f"{row.nbytes / 2**20:.2f}", f"{rows[0].nbytes / row.nbytes:.2f}",
            f"{row.kl_mean:.5f}", f"{row.kl_max:.4f}", f"{row.top1:.1%}", f"{row.ms_per_token:.1f}",
        )  # fmt: skip
    return table
