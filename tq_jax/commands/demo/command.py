"""`tq-jax demo`: a real model answers from compressed caches; size, quality and speed are measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tq_jax.commands.demo.rows import NEW_TOKENS, PREFIX, Row, make_prompt, make_schemes, measure_rows
from tq_jax.commands.divergence import CHUNK
from tq_jax.commands.inputs import CHARACTERS_PER_TOKEN, keep_compiled, open_model, read_text, require_tokens
from tq_jax.commands.options import (
    DEFAULT_MODEL,
    JsonTarget,
    ModelName,
    TextFile,
    parse_bits,
    picture_option,
    refusing,
)
from tq_jax.commands.output import environment, open_console, write_json
from tq_jax.data import persuasion

DEFAULT_BITS = "8/4,4/4,3/3,2/2"
KL_BOUNDS: dict[tuple[float, float], float] = {(4, 4): 0.008, (3, 3): 0.03, (2, 2): 0.2}
"""Largest mean KL allowed on the default model and text, by key and value bits."""

PPL_BOUND = 0.01
"""Largest relative change of perplexity allowed for K4/V4."""

LEGEND = """\
K4/V4: keys and values of 4 bits; grey: TurboQuant as published.
bits: stored per number of a compressed token, scales included; ratio: bfloat16 over that.
ratio, all: bfloat16 over the whole cache, with its exact tokens; MB: of the whole cache.
KL: mean divergence of the next token from full precision, nats, and its 99.9 % quantile; less is better.
same top-1: how often the most likely token is the same; perplexity: its change."""
"""What the columns of the table are."""

QUESTIONS = {
    True: "What is the name of Sir Walter Elliot's home?",
    False: "What is this text about? Answer in one sentence.",
}
"""The question about the default text (True) and about any other text (False)."""


def demo(
    model: ModelName = None,
    text: TextFile = None,
    bits: Annotated[str, typer.Option(help="Key/value bits of each compressed cache, comma-separated.")] = DEFAULT_BITS,
    positions: Annotated[int, typer.Option(help="Number of predictions to compare.", min=CHUNK)] = 1024,
    question: Annotated[str | None, typer.Option(help="Question about the text.")] = None,
    plot: Annotated[Path, picture_option("quality and memory")] = Path("tq-jax-demo.png"),
    json: JsonTarget = None,
) -> None:
    """Generate from compressed caches with a real model, and show what they save and cost.

    The model answers the same prompt, a long text and a question about it, from a bfloat16 cache and from compressed
    caches. Next-token distributions over the text are compared with full precision. TurboQuant as published is shown
    beside this project's defaults at the same bits. Exits 0 only if the claims printed under the table hold.
    """
    keep_compiled()
    widths = parse_bits(bits)
    content = read_text(text) if text else persuasion()
    asked = question or QUESTIONS[text is None]
    console = open_console(json)
    console.print(f"Loading {model or DEFAULT_MODEL} (downloaded and unpacked the first time)")
    language_model = open_model(model)
    decoder = language_model.decoder
    tokens = language_model.tokenizer.encode(content[: CHARACTERS_PER_TOKEN * (PREFIX + positions)])
    forced = tokens[: PREFIX + positions + 1]
    require_tokens("the text", len(forced), positions + 2)
    require_tokens("the model's context", decoder.config.max_context, max(len(forced), PREFIX + NEW_TOKENS))
    with refusing("models"):
        schemes = make_schemes(decoder, len(forced) + NEW_TOKENS + 256, widths)
    prompt = make_prompt(language_model, tokens, asked)
    rows = measure_rows(language_model, schemes, forced, positions, prompt, console)
    claims = check_claims(rows, default=model is None and text is None)
    print_results(rows, claims, asked, console)
    source = text.name if text else "persuasion"
    from tq_jax.commands.demo.picture import draw  # matplotlib is optional

    draw([row.as_dict() for row in rows], plot, title=f"{model or DEFAULT_MODEL}, {positions} positions of {source}")
    console.print(f"Picture: {plot}")
    payload = {"model": model or DEFAULT_MODEL, "positions": rows[0].quality.positions} | environment()
    named = [{"text": source} | row.as_dict() for row in rows]
    write_json(payload | {"rows": named, "claims": claims, "question": asked}, json)
    if not all(claims.values()):
        raise typer.Exit(1)


def check_claims(rows: Sequence[Row], *, default: bool) -> dict[str, bool]:
    """Whether the claims of the demo hold.

    Args:
        rows: The measurements.
        default: Whether model and text are the defaults, for which KL and perplexity have bounds.

    Returns:
        The claims, and whether each holds.
    """
    claims = {}
    plain = {(r.scheme.key_bits, r.scheme.value_bits): r.quality for r in rows if r.scheme.name == "turboquant"}
    for row in rows:
        width = (row.scheme.key_bits, row.scheme.value_bits)
        if row.scheme.name != "tq":
            continue
        if width in plain:
            gain = plain[width].kl_mean / row.quality.kl_mean
            claims[f"{row.scheme.label}: less KL than as published ({gain:.1f} times)"] = gain > 1
        if default and width in KL_BOUNDS:
            claims[f"{row.scheme.label}: KL at most {KL_BOUNDS[width]}"] = row.quality.kl_mean <= KL_BOUNDS[width]
        if default and width == (4, 4):
            change = abs(row.quality.ppl / row.quality.ppl_fp - 1)
            claims[f"K4/V4: perplexity within {PPL_BOUND:.0%} ({change:.2%})"] = change <= PPL_BOUND
    return claims


def print_results(rows: Sequence[Row], claims: dict[str, bool], question: str, console: Console) -> None:
    """Prints the table and what its columns are, the question and its answers, and the claims."""
    console.print(make_table(rows))
    console.print(LEGEND, style="dim")
    console.print(f"{question!r}, asked about the beginning of the text, is answered from each cache:")
    for row in rows:
        if row.answer is not None:
            console.print(f"[bold]{row.scheme.label:>8}[/bold]  {row.answer!r}")
    for claim, holds in claims.items():
        console.print(f"{'holds' if holds else 'FAILS'}  {claim}", style=None if holds else "red")


def make_table(rows: Sequence[Row]) -> Table:
    """The rows for a reader."""
    table = Table(title="Key-value caches compared with full precision", title_justify="left")
    columns = ("cache", "bits", "ratio", "ratio, all", "MB", "KL", "KL 99.9 %", "same top-1", "perplexity", "tokens/s")
    for name in columns:
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    for row in rows:
        quality = row.quality
        table.add_row(
            row.scheme.label,
            f"{row.scheme.stored_bits:.2f}",
            f"{row.description['ratio_compressed']:.2f}",
            f"{row.description['ratio_total']:.2f}",
            f"{row.nbytes / 1e6:.1f}",
            f"{quality.kl_mean:.5f}",
            f"{quality.kl_p999:.4f}",
            f"{quality.top1:.1%}",
            f"{quality.ppl / quality.ppl_fp - 1:+.2%}",
            f"{row.tokens_per_second:.1f}" if row.tokens_per_second else "",
            style="dim" if row.scheme.name == "turboquant" else "",
        )
    return table
