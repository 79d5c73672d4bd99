"""`tq-jax needle`: facts hidden in a long text are asked for in a chat, with compressed caches and without."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from tq_jax.commands import options
from tq_jax.commands.claims import Claim
from tq_jax.commands.divergence import Reference, run_prompt
from tq_jax.commands.eval.schemes import Candidate, Packed, candidates
from tq_jax.commands.inputs import keep_compiled, open_model, require_tokens
from tq_jax.commands.needle.haystack import DIGITS, Haystack, make_haystack
from tq_jax.commands.output import environment, known_rows, open_console, progress_bar, write_json, write_partial
from tq_jax.models import Decoder

PADDING = 64
"""The length of a question with its answer is padded to a multiple of so many tokens."""

RIVALS = ("TurboQuant mse 4", "TurboQuant mse 3", "TurboQuant prod 4", "KIVI 2, groups of 32")
HOLDING = ("K4/V4", "K3/V3")
"""Caches that must find every number that full precision knows."""

KNOWN = 0.5
"""Least probability at which full precision knows a number; numbers below are found by a narrow margin."""

LOST_PER_DIGIT = 0.02
"""Log-probability that K4/V4 may lose per digit, mean, nats."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt with facts in it.

    Attributes:
        size: Number of tokens that the prompt is padded to.
        seed: Index of the repetition.
        haystack: The prompt and its questions.
    """

    size: int
    seed: int
    haystack: Haystack


def needle(
    model: options.ModelName = None,
    lengths: Annotated[
        str, typer.Option(help="Most tokens of each prompt, which ends with a sentence.")
    ] = "1024,2048,4096",
    depths: Annotated[str, typer.Option(help="Where facts lie, from 0 to 1, ascending.")] = "0.05,0.25,0.5,0.75,0.95",
    bits: Annotated[str, typer.Option(help="Key/value bits of this package's caches.")] = "4/4,3/3,2/2",
    facts: Annotated[int, typer.Option(help="Facts per text; further depths go to further texts.", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="Texts per length and depth.", min=1)] = 2,
    window: Annotated[int, typer.Option(help="Latest tokens in full precision.", min=0)] = 128,
    plot: Annotated[Path, options.picture_option("the numbers found")] = Path("tq-jax-needle.png"),
    resume: options.Resume = False,
    json: options.JsonTarget = None,
) -> None:
    """Hide seven-digit numbers in a novel and ask for each in a chat, from compressed caches.

    Every number is graded twice: by whether greedy decoding writes all its digits, and by the log-probability of the
    digits. The same questions are asked in full precision. Several facts in one text are harder, because small models
    confuse them. Exits 0 only if K4/V4 and K3/V3 find every number to which full precision gives a probability of at
    least one half, and K4/V4 loses at most 0.02 nats per digit.
    """
    keep_compiled()
    console = open_console(json)
    sizes, places, widths = options.parse_numbers(lengths, int), parse_depths(depths), options.parse_bits(bits)
    if facts > len(places):
        raise typer.BadParameter(f"expected at most as many --facts as --depths ({len(places)}), got {facts}")
    kind = {"model": model or options.DEFAULT_MODEL, "window": window, "facts": facts, "depths": places}
    rows = known_rows(json, kind) if resume else []
    groups = [places[i : i + facts] for i in range(0, len(places), facts)]
    language_model = open_model(model)
    decoder = language_model.decoder
    require_tokens("the model's context", decoder.config.max_context, max(sizes) + PADDING)
    with options.refusing("models"):
        every = candidates(decoder, max(sizes) + 2 * PADDING, bits=widths, window=window)
        plan = [
            Text(size, seed, make_haystack(language_model.tokenizer, size, group, seed=seed * len(groups) + index))
            for size, seed, (index, group) in itertools.product(sizes, range(repeats), enumerate(groups))
        ]
    chosen = [c for c in every if isinstance(c, Packed) or c.describe(decoder)["label"] in RIVALS]
    payload = kind | environment()
    for _ in ask_all(decoder, plan, chosen, rows, console):
        write_partial(payload, rows, json)
    claims = judge(rows)
    console.print(make_table(rows))
    for claim in claims:
        console.print(f"{'holds' if claim.ok else 'FAILS'}  {claim.name}: {claim.figure:.3g} ({claim.note})")
    texts = f"{facts} per text" if facts > 1 else "each in its own text"
    from tq_jax.commands.needle.picture import draw  # matplotlib is optional

    draw(rows, plot, title=f"{model or options.DEFAULT_MODEL}: numbers found, {texts}, window {window}")
    console.print(f"Picture: {plot}")
    write_json(payload | {"rows": rows, "complete": True, "claims": [claim.as_dict() for claim in claims]}, json)
    if not all(claim.ok for claim in claims):
        raise typer.Exit(1)


def parse_depths(text: str) -> tuple[float, ...]:
    """Parses depths like "0.05,0.5".

    Raises:
        typer.BadParameter: If the text is not a list of numbers, or the numbers do not ascend from 0 to 1.

    Example:
        >>> parse_depths("0.05,0.5")
        (0.05, 0.5)
    """
    found = tuple(options.parse_numbers(text, float))
    if found[-1] > 1 or any(below >= above for below, above in itertools.pairwise(found)):
        raise typer.BadParameter(f"expected depths from 0 to 1, ascending, got {text!r}")
    return found


def ask_all(
    decoder: Decoder, plan: Sequence[Text], chosen: Sequence[Candidate], rows: list[dict[str, Any]], console: Console
) -> Iterator[None]:
    """Asks every question of every text from every cache; adds rows, and yields after each cache.

    Args:
        decoder: The model.
        plan: The texts.
        chosen: The caches.
        rows: Rows that are known; they are not measured again.
        console: Where to show progress.
    """
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(plan) * len(chosen))
        for text in plan:
            labels = [{"length": text.size, "seed": text.seed} | candidate.describe(decoder) for candidate in chosen]
            first = {"depth": text.haystack.questions[0].depth}
            # Ratios in a label depend on the longest text of a run, so they do not tell questions apart.
            asked = [{name: label[name] for name in ("length", "seed", "label")} | first for label in labels]
            done = [any(row.items() >= question.items() for row in rows) for question in asked]
            progress.advance(task, sum(done))
            if all(done):
                continue
            prompt = read_prompt(decoder, text.haystack, text.size)
            for label, candidate in itertools.compress(zip(labels, chosen, strict=True), (not x for x in done)):
                progress.update(task, description=f"{text.size} tokens, {label['label']}")
                rows += [label | found for found in ask(decoder, prompt, text.haystack, candidate)]
                progress.advance(task)
                yield


def read_prompt(decoder: Decoder, haystack: Haystack, size: int) -> Reference:
    """Runs the shared prompt in full precision, right-padded to a number of tokens."""
    padded = np.zeros(size, np.int32)
    padded[: len(haystack.tokens)] = haystack.tokens
    _, projections = run_prompt(decoder, jnp.asarray(padded)[None])
    return Reference(jnp.asarray(padded), len(haystack.tokens), projections, [])


def ask(decoder: Decoder, prompt: Reference, haystack: Haystack, candidate: Candidate) -> list[dict[str, float | bool]]:
    """Asks for every fact; question and answer read the prompt from the cache.

    Args:
        decoder: The model.
        prompt: The result of `read_prompt`.
        haystack: The questions.
        candidate: The cache.

    Returns:
        For each question: its depth, whether each digit is the most likely token, and the log-probability of all
        digits.
    """
    found, filled = [], candidate.start(decoder, prompt)
    for question in haystack.questions:
        tokens = question.prompt + question.answer
        padded = np.zeros((1, -(-len(tokens) // PADDING) * PADDING), np.int32)
        padded[0, : len(tokens)] = tokens
        cache = jax.tree.map(jnp.copy, filled)
        logits, _ = candidate.extend(decoder, jnp.asarray(padded), cache, count=jnp.int32(len(tokens)))
        log_probs = np.asarray(jax.nn.log_softmax(logits[len(question.prompt) - 1 : len(tokens) - 1]))
        answer = np.asarray(question.answer)
        exact = bool(np.all(np.argmax(log_probs, axis=1) == answer))
        total = float(np.sum(log_probs[np.arange(len(answer)), answer], dtype=np.float64))
        found.append({"depth": question.depth, "exact": exact, "log_prob": total})
    return found


def judge(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Whether compressed caches find the numbers that full precision knows.

    Args:
        rows: Rows as in the command's JSON.
    """

    def of(label: str) -> dict[tuple, dict[str, Any]]:
        return {(r["length"], r["seed"], r["depth"]): r for r in rows if r["label"] == label}

    full, claims = of("bfloat16"), []
    known = [key for key, row in full.items() if row["log_prob"] >= math.log(KNOWN)]
    found = sum(row["exact"] for row in full.values())
    for label in HOLDING:
        if not (ours := of(label)):
            continue
        kept = sum(ours[key]["exact"] for key in known)
        note = f"{kept} of {len(known)} known, {sum(row['exact'] for row in ours.values())} and {found} found in all"
        name = f"{label}: share found of the numbers that full precision gives at least {KNOWN:g}"
        claims.append(Claim(name, kept / max(len(known), 1), ">=", 1.0, note=note))
    if ours := of(HOLDING[0]):
        change = float(np.mean([ours[key]["log_prob"] - row["log_prob"] for key, row in full.items()])) / DIGITS
        name = f"{HOLDING[0]}: log-probability of a digit, change"
        claims.append(Claim(name, change, ">=", -LOST_PER_DIGIT, note="nats, mean"))
    return claims


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Numbers found and their mean log-probability, by cache and length."""
    table = Table(title="Numbers found, and the mean log-probability of their digits", title_justify="left")
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    for name in ("cache", "bits", *(f"{n} tokens" for n in lengths)):
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    for label in dict.fromkeys(row["label"] for row in rows):
        same = [row for row in rows if row["label"] == label]
        cells = []
        for length in lengths:
            here = [row for row in same if row["length"] == length]
            mean = sum(row["log_prob"] for row in here) / len(here)
            cells.append(f"{sum(row['exact'] for row in here)}/{len(here)}  {mean:7.3f}")
        table.add_row(label, f"{same[0]['stored_bits_per_element']:.2f}", *cells)
    return table
