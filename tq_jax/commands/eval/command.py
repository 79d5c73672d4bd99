"""`tq-jax eval`: what caches and their rivals do to a language model, per stored bit, on several real texts."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from tq_jax.commands.demo.command import DEFAULT_MODEL, parse_bits
from tq_jax.commands.eval.ablation import variants
from tq_jax.commands.eval.claims import judge
from tq_jax.commands.eval.schemes import SINKS, Candidate, attention_quality, candidates
from tq_jax.commands.eval.table import make_table, one_line
from tq_jax.commands.inputs import ModelName, first_tokens, open_model
from tq_jax.commands.language import CHUNK, full_scheme, make_reference, measure
from tq_jax.commands.output import (
    JsonTarget,
    environment,
    known_rows,
    open_console,
    parse_numbers,
    picture_option,
    progress_bar,
    refusing,
    write_json,
)
from tq_jax.commands.texts import load_texts
from tq_jax.models import Decoder, LanguageModel, cache_dir, generate


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: Name or path.
        prompt: Tokens before the first prediction.
        positions: Predictions of each text.
        bits: Key and value bits of this package's caches.
        windows: Latest tokens in full precision.
        ablation: Whether parts of this package's caches are compared instead of rivals.
    """

    model: str
    prompt: int
    positions: int
    bits: tuple[tuple[float, float], ...]
    windows: tuple[int, ...]
    ablation: bool = False

    def plan(self, decoder: Decoder) -> list[tuple[int, Candidate]]:
        """All windows and candidates, in order."""
        room = self.prompt + self.positions + 1
        make = variants if self.ablation else candidates
        return [(w, c) for w in self.windows for c in make(decoder, room, bits=self.bits, window=w)]


def evaluate(
    model: ModelName = None,
    texts: Annotated[
        str, typer.Option(help="Comma-separated: persuasion, pydoc, wiki and jargon (downloaded), or files.")
    ] = "persuasion,pydoc,wiki",
    bits: Annotated[str, typer.Option(help="Key/value bits of this package's caches.")] = "8/4,4/4,3/3,2/2",
    prompt: Annotated[int, typer.Option(help="Tokens before the first prediction.", min=256)] = 1024,
    positions: Annotated[int, typer.Option(help="Predictions compared, of each text.", min=CHUNK)] = 512,
    windows: Annotated[str, typer.Option(help="Latest tokens in full precision, comma-separated.")] = "128,0",
    plot: Annotated[Path, picture_option("divergence against stored bits")] = Path("tq-jax-eval.png"),
    generated: Annotated[
        bool, typer.Option("--generated", help="Predict what the model itself writes after each prompt.")
    ] = False,
    ablation: Annotated[bool, typer.Option("--ablation", help="Compare parts of this package's caches.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that the JSON file has already.")] = False,
    json: JsonTarget = None,
) -> None:
    """Compare caches and other quantizers on a real model: divergence of the next token per stored bit.

    Every text is teacher-forced in chunks that read the cache. This package's caches are real, packed ones; TurboQuant
    as published, KIVI, vLLM's presets, int4 and fp8 are rounded as they store numbers, with the same tokens in full
    precision. Stored bits count scales, zeros and layers left alone. Rows are written to the JSON file as they come.
    With --generated the text after each prompt is the greedy one of full precision, and the predictions before the
    first that differs are the text that a cache would share with it.
    Exits 0 only if no rival reaches a lower divergence at equal bits; an ablation claims nothing.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    console = open_console(json)
    widths, sizes = tuple(parse_bits(bits)), tuple(parse_numbers(windows, int))
    if max(sizes) + SINKS >= prompt:
        raise typer.BadParameter(f"expected windows that leave something of the prompt of {prompt}, got {windows!r}")
    settings = Settings(model or DEFAULT_MODEL, prompt, positions - positions % CHUNK, widths, sizes, ablation)
    kind = {"model": settings.model, "positions": settings.positions, "prompt": prompt, "ablation": ablation}
    rows = known_rows(json, kind) if resume else []
    contents = load_texts(texts.split(","))
    language_model = open_model(model)
    count = prompt + settings.positions + 1
    beginnings = {stem: first_tokens(language_model, stem, content, count) for stem, content in contents.items()}
    with refusing("models"):
        steps = len(beginnings) * len(settings.plan(language_model.decoder))
    payload = kind | environment()
    with progress_bar(console) as progress:
        task = progress.add_task("", total=steps)
        for stem, tokens in beginnings.items():
            name = f"{stem}, generated" if generated else stem
            progress.update(task, description=name)
            if generated:
                tokens = continued(language_model, tokens[:prompt], settings.positions + 1)
            progress.advance(task, sum(row["text"] == name for row in rows))
            for row in measure_text(language_model.decoder, tokens, settings, name, rows):
                rows.append(row)
                progress.advance(task)
                console.print(one_line(row), highlight=False)
                if json not in (None, "-"):
                    write_json(payload | {"rows": rows, "complete": False}, json)
    claims = [] if ablation else judge(rows)
    for name in dict.fromkeys(row["text"] for row in rows):
        console.print(make_table([row for row in rows if row["text"] == name], name))
    for claim in claims:
        console.print(f"{'holds' if claim.ok else 'FAILS'}  {claim.name}: {claim.note}", highlight=False)
    from tq_jax.commands.eval import picture  # matplotlib is optional

    picture = picture.draw_ablation if ablation else picture.draw
    picture(rows, plot, title=f"{settings.model}, {settings.positions} positions a text after {prompt} tokens")
    console.print(f"Picture: {plot}")
    write_json(payload | {"rows": rows, "complete": True, "claims": [claim.as_dict() for claim in claims]}, json)
    if not all(claim.ok for claim in claims):
        raise typer.Exit(1)


def continued(model: LanguageModel, tokens: list[int], count: int) -> list[int]:
    """A text and what the model adds to it in full precision, the most likely token at a time.

    Args:
        model: The model.
        tokens: The text.
        count: Tokens to add.
    """
    spec = full_scheme(model.decoder, len(tokens) + count, dtype="float32").cache
    ids = jnp.asarray([tokens], jnp.int32)
    lengths = jnp.asarray([len(tokens)], jnp.int32)
    found = generate(model.decoder, ids, lengths, cache_spec=spec, max_new_tokens=count)
    return tokens + found.sequences()[0]


def measure_text(
    decoder: Decoder, tokens: list[int], settings: Settings, text: str, known: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Rows of a text that are not known yet, one after the other.

    Args:
        decoder: The model.
        tokens: The text.
        settings: What to measure.
        text: Its name.
        known: Rows that need not be measured again.
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
