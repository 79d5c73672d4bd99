"""`tq-jax eval --task`, after its options are parsed."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.progress import Progress, TaskID

from tq_jax.commands.inputs import open_model
from tq_jax.commands.options import DEFAULT_MODEL, refusing
from tq_jax.commands.output import environment, known_rows, open_console, progress_bar, write_json, write_partial
from tq_jax.commands.tasks.measure import EXACT, Plan, measure_task
from tq_jax.commands.tasks.questions import Batch, Task, load_tasks, make_batches
from tq_jax.commands.tasks.score import judge
from tq_jax.commands.tasks.table import make_table, one_line
from tq_jax.models import LanguageModel


@dataclasses.dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        tasks: Names of tasks, see `tq_jax.commands.tasks.questions.NAMES`.
        items: Questions per task.
        new_tokens: Most tokens of an answer.
        context: Tokens of RULER's questions, their answers included.
        batch: Questions that are answered together.
    """

    tasks: tuple[str, ...]
    items: int = 20
    new_tokens: int = 512
    context: int = 4096
    batch: int = 16


def answer(questions: Questions, plan: Plan, *, model: str | None, plot: Path, json: str | None, resume: bool) -> None:
    """Answers, grades, prints and draws; see `tq_jax.commands.eval.command.evaluate`.

    Args:
        questions: What is asked.
        plan: The caches.
        model: Value of the `--model` option.
        plot: The picture.
        json: Value of the `--json` option.
        resume: Whether rows of the JSON file are kept.

    Raises:
        typer.BadParameter: If a task, a label or the model cannot be had, or a question exceeds the model's context.
        typer.Exit: With code 1 if a claim does not hold.
    """
    console, name = open_console(json), model or DEFAULT_MODEL
    kind = {"model": name, "items": questions.items, "new_tokens": questions.new_tokens, "context": questions.context}
    rows = known_rows(json, kind) if resume else []
    language_model = open_model(model)
    asked = _prepare(language_model, questions, plan)
    payload = kind | environment()
    with progress_bar(console) as progress:
        bar = progress.add_task("full precision", total=sum(len(batches) * caches for _, batches, caches in asked))
        for task, batches, _ in asked:
            progress.advance(bar, len(batches) * sum(row["task"] == task.name for row in rows))
            advance = functools.partial(_advance, progress, bar, task.name)
            for row in measure_task(language_model, task, batches, plan, tuple(rows), advance=advance):
                rows.append(row)
                console.print(one_line(row), highlight=False)
                write_partial(payload, rows, json)
    claims = judge(rows, EXACT)
    for task, *_ in asked:
        console.print(make_table([row for row in rows if row["task"] == task.name], task.name))
    for claim in claims:
        console.print(f"{'holds' if claim.ok else 'FAILS'}  {claim.name}: {claim.figure:.2g} ({claim.note})")
    from tq_jax.commands.tasks import picture  # matplotlib is optional

    picture.draw(rows, plot, title=f"{name}: answers from each cache")
    console.print(f"Picture: {plot}")
    write_json(payload | {"rows": rows, "complete": True, "claims": [claim.as_dict() for claim in claims]}, json)
    if not all(claim.ok for claim in claims):
        raise typer.Exit(1)


def _advance(progress: Progress, bar: TaskID, task: str, label: str) -> None:
    progress.update(bar, description=f"{task}, {label}")
    progress.advance(bar)


def _prepare(model: LanguageModel, questions: Questions, plan: Plan) -> list[tuple[Task, Sequence[Batch], int]]:
    """Every task with its batches and the number of caches that answer; refuses what cannot run."""
    found = []
    limits = {"count": questions.items, "most": questions.new_tokens, "length": questions.context}
    for task in load_tasks(questions.tasks, model.tokenizer, **limits):
        batches = make_batches(model, task, batch=questions.batch)
        room = batches[0].tokens.shape[1] + task.most
        with refusing("models"):
            caches = plan.caches(model.decoder, room)
        found.append((task, batches, len(caches)))
    return found
