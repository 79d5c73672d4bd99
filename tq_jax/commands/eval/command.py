"""`tq-jax eval`: what caches and their rivals do to a language model, per stored bit, on several real texts."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import typer
from rich.console import Console

from tq_jax.commands.claims import Claim
from tq_jax.commands.divergence import CHUNK, full_scheme, make_reference, measure
from tq_jax.commands.eval.ablation import variants
from tq_jax.commands.eval.claims import judge
from tq_jax.commands.eval.schemes import SINKS, Candidate, attention_quality, candidates, choose
from tq_jax.commands.eval.table import make_table, one_line
from tq_jax.commands.eval.texts import load_texts
from tq_jax.commands.inputs import first_tokens, keep_compiled, open_model
from tq_jax.commands.options import (
    DEFAULT_MODEL,
    JsonTarget,
    ModelName,
    Resume,
    parse_bits,
    parse_numbers,
    picture_option,
    refusing,
    require_unset,
)
from tq_jax.commands.output import environment, known_rows, open_console, progress_bar, write_json, write_partial
from tq_jax.commands.rivals.calibrated import EVERY
from tq_jax.commands.rivals.own import load_rivals
from tq_jax.commands.rivals.roundings import Rival
from tq_jax.commands.tasks.command import Questions, answer
from tq_jax.commands.tasks.measure import Plan
from tq_jax.models import Decoder, LanguageModel, generate

Row = dict[str, Any]

TEXTS = "persuasion,pydoc,wiki"
PROMPT, POSITIONS = 1024, 512
"""What is measured if the options do not say otherwise."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The measurements to make.

    Attributes:
        model: Name or path of the model.
        prompt: Number of tokens before the first prediction.
        positions: Number of predictions per text.
        bits: Pairs of key and value bits of this package's caches.
        windows: Numbers of latest tokens in full precision.
        ablation: Whether parts of this package's caches are compared instead of rivals.
        generated: Whether the texts after the prompts are the model's own.
        own: Rivals beside the built-in ones.
        only: Parts of labels of the caches that are measured; all if there are none.
    """

    model: str
    prompt: int
    positions: int
    bits: tuple[tuple[float, float], ...]
    windows: tuple[int, ...]
    ablation: bool = False
    generated: bool = False
    own: tuple[Rival, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def kind(self) -> dict[str, Any]:
        """Fields that rows of a resumed run must agree in, as plain data."""
        names = ("model", "positions", "prompt", "ablation")
        return {name: getattr(self, name) for name in names}

    def plan(self, decoder: Decoder) -> list[tuple[int, Candidate]]:
        """Every window with every candidate that is wanted, in order.

        Raises:
            typer.BadParameter: If no label has one of the parts.
        """
        room = self.prompt + self.positions + 1
        make = variants if self.ablation else functools.partial(candidates, rivals=EVERY + self.own)
        every = [(w, c) for w in self.windows for c in make(decoder, room, bits=self.bits, window=w)]
        return choose(every, decoder, self.only)


def evaluate(
    model: ModelName = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: persuasion, pydoc, code, wiki and jargon (downloaded), or files; the first two and "
            "wiki by default."
        ),
    ] = None,
    bits: Annotated[str, typer.Option(help="Key/value bits of this package's caches.")] = "8/4,4/4,3/3,2/2",
    prompt: Annotated[
        int | None, typer.Option(help="Number of tokens before the first prediction; 1024 by default.", min=256)
    ] = None,
    positions: Annotated[
        int | None, typer.Option(help="Number of predictions to compare per text; 512 by default.", min=CHUNK)
    ] = None,
    windows: Annotated[str, typer.Option(help="Latest tokens in full precision, comma-separated.")] = "128,0",
    plot: Annotated[Path, picture_option("divergence against stored bits")] = Path("tq-jax-eval.png"),
    generated: Annotated[
        bool, typer.Option("--generated", help="Predict the text that the model itself writes after each prompt.")
    ] = False,
    ablation: Annotated[bool, typer.Option("--ablation", help="Compare parts of this package's caches.")] = False,
    rival: Annotated[
        str, typer.Option(metavar="MODULE:NAME", help="Rivals of your own, comma-separated: importable from here.")
    ] = "",
    task: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Questions to answer to the end instead of texts to predict.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Questions per task; 20 by default.", min=1)] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer; 512 by default.", min=2)] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of RULER's questions with their answers; 4096 by default.", min=256)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Questions that are answered together; 16 by default.", min=1)
    ] = None,
    only: Annotated[
        str, typer.Option(help="Caches with such parts in their labels, comma-separated; all by default.")
    ] = "",
    resume: Resume = False,
    json: JsonTarget = None,
) -> None:
    """Compare caches and other quantizers on a real model: divergence of the next token per stored bit, or answers.

    Every text is teacher-forced in chunks that read the cache. This package's caches are real, packed caches. Numbers
    of TurboQuant as published, KIVI, vLLM's presets, int4, fp8, Block-GTQ and OSCAR (both calibrated on the text
    itself) are rounded as these methods store them, with the same tokens in full precision. Stored bits count scales,
    zeros and layers that are not quantized. Each row is written to the JSON file as soon as it is measured.

    With --generated, the text after each prompt is what the model writes greedily in full precision; the number of
    predictions before the first one that differs is then the length of the text that a cache would share with it.

    With --rival, quantizers of your own join them: each name is a tq_jax.commands.rivals.roundings.Rival.

    With --task, every cache answers questions to the end, and their own rules grade the answers: gsm8k, ruler/SUBSET
    (niah_single_1, vt, ...) and reasoning/DATASET (a name of reasoning-gym), downloaded. Beside scores with their
    intervals stands the divergence of each step along the answers in full precision: do errors add up?

    Exits 0 only if no rival reaches a lower divergence at equal bits, or if no more answers of K4/V4, and with a window
    of K3/V3, are lost than by chance; an ablation claims nothing.
    """
    if rival and ablation:
        raise typer.BadParameter(f"expected --rival or --ablation, which compares no rivals, got --rival {rival} too")
    keep_compiled()
    widths, sizes, own = tuple(parse_bits(bits)), tuple(parse_numbers(windows, int)), _own_rivals(rival)
    parts = tuple(only.split(",")) if only else ()
    asked = {"items": items, "new_tokens": new_tokens, "context": context, "batch": batch}
    if task is not None:
        said = {"texts": texts, "prompt": prompt, "positions": positions, "generated": generated, "ablation": ablation}
        require_unset("with --task, whose questions are no texts", **said)
        plan = Plan(widths, sizes, own, parts)
        questions = Questions(tuple(task.split(",")), **{name: n for name, n in asked.items() if n is not None})
        return answer(questions, plan, model=model, plot=plot, json=json, resume=resume)
    require_unset("without --task", **asked)
    prompt, positions = prompt or PROMPT, (positions or POSITIONS) // CHUNK * CHUNK  # neither can be 0
    if max(sizes) + SINKS >= prompt:
        raise typer.BadParameter(f"expected windows that leave something of the prompt of {prompt}, got {windows!r}")
    settings = Settings(model or DEFAULT_MODEL, prompt, positions, widths, sizes, ablation, generated, own, parts)
    _run(settings, (TEXTS if texts is None else texts).split(","), model=model, plot=plot, json=json, resume=resume)


def _run(
    settings: Settings, texts: Sequence[str], *, model: str | None, plot: Path, json: str | None, resume: bool
) -> None:
    """Measures, prints and draws; see `evaluate`."""
    console = open_console(json)
    rows = known_rows(json, settings.kind) if resume else []
    contents = load_texts(texts)
    language_model = open_model(model)
    count = settings.prompt + settings.positions + 1
    beginnings = {stem: first_tokens(language_model, stem, content, count) for stem, content in contents.items()}
    payload = settings.kind | environment()
    for _ in measure_texts(language_model, beginnings, settings, rows, console):
        write_partial(payload, rows, json)
    claims = [] if settings.ablation else judge(rows)
    print_results(rows, claims, console)
    from tq_jax.commands.eval import picture  # matplotlib is optional

    draw = picture.draw_ablation if settings.ablation else picture.draw
    draw(rows, plot, title=f"{settings.model}, {settings.positions} positions per text after {settings.prompt} tokens")
    console.print(f"Picture: {plot}")
    write_json(payload | {"rows": rows, "complete": True, "claims": [claim.as_dict() for claim in claims]}, json)
    if not all(claim.ok for claim in claims):
        raise typer.Exit(1)


def _own_rivals(names: str) -> tuple[Rival, ...]:
    return tuple(load_rivals(names.split(","))) if names else ()


def measure_texts(
    model: LanguageModel, beginnings: dict[str, list[int]], settings: Settings, rows: list[Row], console: Console
) -> Iterator[Row]:
    """Measures every text; each new row is added to the rows, printed, and yielded.

    Args:
        model: The model.
        beginnings: First tokens of each text, by name.
        settings: What to measure.
        rows: Rows that are known; they are not measured again.
        console: Where to show progress.

    Raises:
        typer.BadParameter: If a scheme does not support the model.
    """
    with refusing("models"):
        steps = len(beginnings) * len(settings.plan(model.decoder))
    with progress_bar(console) as progress:
        task = progress.add_task("", total=steps)
        for stem, tokens in beginnings.items():
            name = f"{stem}, generated" if settings.generated else stem
            progress.update(task, description=name)
            if settings.generated:
                tokens = continued(model, tokens[: settings.prompt], settings.positions + 1)
            progress.advance(task, sum(row["text"] == name for row in rows))
            for row in measure_text(model.decoder, tokens, settings, name, rows):
                rows.append(row)
                progress.advance(task)
                console.print(one_line(row), highlight=False)
                yield row


def print_results(rows: Sequence[Row], claims: Sequence[Claim], console: Console) -> None:
    """Prints one table per text, and the claims."""
    for name in dict.fromkeys(row["text"] for row in rows):
        console.print(make_table([row for row in rows if row["text"] == name], name))
    for claim in claims:
        console.print(f"{'holds' if claim.ok else 'FAILS'}  {claim.name}: {claim.note}", highlight=False)


def continued(model: LanguageModel, tokens: list[int], count: int) -> list[int]:
    """A text, followed by tokens that the model generates greedily in full precision.

    Args:
        model: The model.
        tokens: The text.
        count: Number of tokens to generate.
    """
    spec = full_scheme(model.decoder, len(tokens) + count, dtype="float32").cache
    ids = jnp.asarray([tokens], jnp.int32)
    lengths = jnp.asarray([len(tokens)], jnp.int32)
    found = generate(model.decoder, ids, lengths, cache_spec=spec, max_new_tokens=count)
    return tokens + found.sequences()[0]


def measure_text(
    decoder: Decoder, tokens: list[int], settings: Settings, text: str, known: Sequence[Row]
) -> Iterator[Row]:
    """Measures one text and yields its rows, except rows that are known.

    Args:
        decoder: The model.
        tokens: The text.
        settings: What to measure.
        text: Name of the text.
        known: Rows that are not measured again.
    """
    done = {(row["text"], row["window"], row["label"]) for row in known}
    rest = [
        (window, candidate)
        for window, candidate in settings.plan(decoder)
        if (text, window, candidate.describe(decoder)["label"]) not in done
    ]
    if not rest:
        return
    reference = make_reference(decoder, tokens, positions=settings.positions)
    for window, candidate in rest:
        attention = attention_quality(decoder, reference, candidate, window=window, sinks=SINKS if window else 0)
        quality = measure(decoder, reference, candidate)
        row = {"text": text, "window": window} | candidate.describe(decoder)
        yield row | dataclasses.asdict(quality) | attention.as_dict()
