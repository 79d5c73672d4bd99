"""`tq-jax eval`: what caches and their rivals do to a language model, per stored bit, on several real texts."""

import dataclasses
import json as json_format
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from tq_jax.evaluate.demo import DEFAULT_MODEL, parse_bits
from tq_jax.evaluate.eval_ablation import variants
from tq_jax.evaluate.eval_claims import judge
from tq_jax.evaluate.eval_picture import draw
from tq_jax.evaluate.eval_schemes import SINKS, Candidate, attention_quality, candidates
from tq_jax.evaluate.eval_table import make_table, one_line
from tq_jax.evaluate.language import CHUNK, make_reference, measure
from tq_jax.evaluate.report import JsonTarget, environment, open_console, progress_bar, write_json
from tq_jax.evaluate.texts import load_text
from tq_jax.models import Decoder, cache_dir, load_model

CHARACTERS_A_TOKEN = 12


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
    model: Annotated[
        str | None, typer.Option(help="GGUF file or Hugging Face directory; SmolLM2-135M-Instruct by default.")
    ] = None,
    texts: Annotated[
        str, typer.Option(help="Comma-separated: persuasion, pydoc, wiki and jargon (downloaded), or files.")
    ] = "persuasion,pydoc,wiki",
    bits: Annotated[str, typer.Option(help="Key/value bits of this package's caches.")] = "8/4,4/4,3/3,2/2",
    prompt: Annotated[int, typer.Option(help="Tokens before the first prediction.", min=256)] = 1024,
    positions: Annotated[int, typer.Option(help="Predictions compared, of each text.", min=CHUNK)] = 512,
    windows: Annotated[str, typer.Option(help="Latest tokens in full precision, comma-separated.")] = "128,0",
    plot: Annotated[Path, typer.Option(help="Where to draw divergence against stored bits.")] = Path("tq-jax-eval.png"),
    ablation: Annotated[bool, typer.Option("--ablation", help="Compare parts of this package's caches.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that the JSON file has already.")] = False,
    json: JsonTarget = None,
) -> None:
    """Compare caches and other quantizers on a real model: divergence of the next token per stored bit.

    Every text is teacher-forced in chunks that read the cache. This package's caches are real, packed ones; TurboQuant
    as published, KIVI, vLLM's presets, int4 and fp8 are rounded as they store numbers, with the same tokens in full
    precision. Stored bits count scales, zeros and layers left alone. Rows are written to the JSON file as they come.
    Exits 0 only if no rival reaches a lower divergence at equal bits; an ablation claims nothing.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    console = open_console(json)
    widths, sizes = tuple(parse_bits(bits)), tuple(int(window) for window in windows.split(","))
    settings = Settings(model or DEFAULT_MODEL, prompt, positions - positions % CHUNK, widths, sizes, ablation)
    rows = known_rows(json, settings) if resume else []
    language_model, names = load_model(model), texts.split(",")
    payload = {"model": settings.model, "positions": settings.positions, "prompt": prompt, "ablation": ablation}
    payload |= environment()
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(names) * len(settings.plan(language_model.decoder)))
        for name in names:
            progress.update(task, description=name, completed=sum(row["text"] in names for row in rows))
            content = load_text(name)[: CHARACTERS_A_TOKEN * (prompt + positions)]
            tokens = language_model.tokenizer.encode(content)[: prompt + settings.positions + 1]
            for row in measure_text(language_model.decoder, tokens, settings, Path(name).stem, rows):
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
    draw(rows, plot, title=f"{settings.model}, {settings.positions} positions a text after {prompt} tokens")
    console.print(f"Picture: {plot}")
    write_json(payload | {"rows": rows, "complete": True, "claims": [claim.as_dict() for claim in claims]}, json)
    if not all(claim.ok for claim in claims):
        raise typer.Exit(1)


def known_rows(target: str | None, settings: Settings) -> list[dict[str, Any]]:
    """Rows of an earlier run that was interrupted.

    Args:
        target: Its JSON file; one that does not exist holds none.
        settings: What is measured now.

    Raises:
        typer.BadParameter: If there can be no file, or it is of another model or length.
    """
    if target in (None, "-"):
        raise typer.BadParameter(f"expected --json PATH with --resume, got {target}")
    path = Path(str(target))
    if not path.is_file():
        return []
    found = json_format.loads(path.read_text("utf-8"))
    for name in ("model", "positions", "prompt", "ablation"):
        if found.get(name) != getattr(settings, name):
            raise typer.BadParameter(
                f"expected rows of {name}={getattr(settings, name)!r} in {path}, got {found.get(name)!r}"
            )
    return found["rows"]


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
