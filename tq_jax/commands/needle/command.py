"""`tq-jax needle`: facts hidden in a long text, asked for in a chat, with compressed caches and without."""

import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.table import Table

from tq_jax.commands.claims import Claim
from tq_jax.commands.demo.command import DEFAULT_MODEL, parse_bits
from tq_jax.commands.eval.schemes import Candidate, Packed, candidates
from tq_jax.commands.inputs import ModelName, open_model, require_tokens
from tq_jax.commands.language import Reference, run_prompt
from tq_jax.commands.needle.haystack import DIGITS, Haystack, make_haystack
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
from tq_jax.models import Decoder, cache_dir

ASKED = 64
"""Tokens that a question and its answer are padded to a multiple of."""

RIVALS = ("TurboQuant mse 4", "TurboQuant mse 3", "TurboQuant prod 4", "KIVI 2, groups of 32")
HOLDING = ("K4/V4", "K3/V3")
"""Caches that must find what full precision knows."""

KNOWN = 0.5
"""Probability of a number from which on full precision knows it; others are found by a hair."""

LOST_A_DIGIT = 0.02
"""Nats of log-probability that K4/V4 may lose, the mean over digits."""


def needle(
    model: ModelName = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, comma-separated.")] = "1024,2048,4096",
    depths: Annotated[str, typer.Option(help="Where facts lie, from 0 to 1, ascending.")] = "0.05,0.25,0.5,0.75,0.95",
    bits: Annotated[str, typer.Option(help="Key/value bits of this package's caches.")] = "4/4,3/3,2/2",
    facts: Annotated[int, typer.Option(help="Facts in one text; the next depths are of another.", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="Texts of each length and of the same depths.", min=1)] = 2,
    window: Annotated[int, typer.Option(help="Latest tokens in full precision.", min=0)] = 128,
    plot: Annotated[Path, picture_option("what was found")] = Path("tq-jax-needle.png"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that the JSON file has already.")] = False,
    json: JsonTarget = None,
) -> None:
    """Hide seven-digit numbers in a novel and ask for each in a chat, from compressed caches.

    Every number is graded twice: whether greedy decoding writes all its digits, and the log-probability of the digits.
    Full precision is asked the same. Several facts in one text are harder: small models confuse them. Exits 0 only if
    K4/V4 and K3/V3 find every number that full precision gives a probability of at least one half, and K4/V4 loses at
    most 0.02 nats a digit.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    console = open_console(json)
    sizes, places, widths = parse_numbers(lengths, int), parse_depths(depths), parse_bits(bits)
    kind = {"model": model or DEFAULT_MODEL, "window": window, "facts": facts, "depths": places}
    rows = known_rows(json, kind) if resume else []
    groups = [places[i : i + facts] for i in range(0, len(places), facts)]
    language_model = open_model(model)
    decoder = language_model.decoder
    require_tokens("the model's context", decoder.config.max_context, max(sizes) + ASKED)
    with refusing("models"):
        every = candidates(decoder, max(sizes) + 2 * ASKED, bits=widths, window=window)
        plan = [
            (size, seed, make_haystack(language_model.tokenizer, size, group, seed=seed * len(groups) + index))
            for size, seed, (index, group) in itertools.product(sizes, range(repeats), enumerate(groups))
        ]
    chosen = [c for c in every if isinstance(c, Packed) or c.describe(decoder)["label"] in RIVALS]
    payload = kind | environment()
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(plan) * len(chosen))
        for size, seed, haystack in plan:
            labels = [{"length": size, "seed": seed} | candidate.describe(decoder) for candidate in chosen]
            first = {"depth": haystack.questions[0].depth}
            done = [any(row.items() >= (label | first).items() for row in rows) for label in labels]
            progress.advance(task, sum(done))
            if all(done):
                continue
            prompt = read_prompt(decoder, haystack, size)
            for label, candidate in itertools.compress(zip(labels, chosen, strict=True), (not x for x in done)):
                progress.update(task, description=f"{size} tokens, {label['label']}", advance=1)
                rows += [label | found for found in ask(decoder, prompt, haystack, candidate)]
                if json not in (None, "-"):
                    write_json(payload | {"rows": rows, "complete": False}, json)
    claims = judge(rows)
    console.print(make_table(rows))
    for claim in claims:
        console.print(f"{'holds' if claim.ok else 'FAILS'}  {claim.name}: {claim.figure:.3g} ({claim.note})")
    texts = f"{facts} in a text" if facts > 1 else "each in its own text"
    from tq_jax.commands.needle.picture import draw  # matplotlib is optional

    draw(rows, plot, title=f"{model or DEFAULT_MODEL}: numbers found, {texts}, window {window}")
    console.print(f"Picture: {plot}")
    write_json(payload | {"rows": rows, "complete": True, "claims": [claim.as_dict() for claim in claims]}, json)
    if not all(claim.ok for claim in claims):
        raise typer.Exit(1)


def parse_depths(text: str) -> tuple[float, ...]:
    """Depths of an option like "0.05,0.5".

    Raises:
        typer.BadParameter: If the text is something else, or they do not ascend from 0 to 1.

    Example:
        >>> parse_depths("0.05,0.5")
        (0.05, 0.5)
    """
    found = tuple(parse_numbers(text, float))
    if found[-1] > 1 or any(below >= above for below, above in itertools.pairwise(found)):
        raise typer.BadParameter(f"expected depths from 0 to 1, ascending, got {text!r}")
    return found


def read_prompt(decoder: Decoder, haystack: Haystack, size: int) -> Reference:
    """Runs the shared prompt exactly, right-padded to a size."""
    padded = np.zeros(size, np.int32)
    padded[: len(haystack.tokens)] = haystack.tokens
    _, projections = run_prompt(decoder, jnp.asarray(padded)[None])
    return Reference(jnp.asarray(padded), len(haystack.tokens), projections, [])


def ask(decoder: Decoder, prompt: Reference, haystack: Haystack, candidate: Candidate) -> list[dict[str, float | bool]]:
    """Asks for every fact; question and answer read the prompt from the cache.

    Args:
        decoder: The model.
        prompt: See `read_prompt`.
        haystack: The questions.
        candidate: What the cache is.

    Returns:
        For each question: depth, whether each digit is the most likely token, and the log-probability of all digits.
    """
    found, filled = [], candidate.start(decoder, prompt)
    for question in haystack.questions:
        tokens = question.prompt + question.answer
        padded = np.zeros((1, -(-len(tokens) // ASKED) * ASKED), np.int32)
        padded[0, : len(tokens)] = tokens
        cache = jax.tree.map(jnp.copy, filled)
        logits, _ = candidate.extend(decoder, jnp.asarray(padded), cache, count=jnp.int32(len(tokens)))
        log_probs = np.asarray(jax.nn.log_softmax(logits[len(question.prompt) - 1 : len(tokens) - 1]))
        answer = np.asarray(question.answer)
        exact = bool(np.all(np.argmax(log_probs, axis=1) == answer))
        total = float(np.sum(log_probs[np.arange(len(answer)), answer], dtype=np.float64))
        found.append({"depth": question.depth, "exact": exact, "log_prob": total})
    return found


def judge(rows: list[dict[str, Any]]) -> list[Claim]:
    """Whether compressed caches find what full precision knows.

    Args:
        rows: What the command writes as "rows".
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
        claims.append(Claim(name, change, ">=", -LOST_A_DIGIT, note="nats, mean"))
    return claims


def make_table(rows: list[dict[str, Any]]) -> Table:
    """Numbers found and mean log-probability, by cache and length."""
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
