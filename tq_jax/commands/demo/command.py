"""`tq-jax demo`: a real model answering from compressed caches, with size, quality and speed measured."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.table import Table

import tq_jax as tq
from tq_jax.commands.inputs import CHARACTERS_A_TOKEN, ModelName, open_model, require_tokens
from tq_jax.commands.language import (
    BITS,
    CHUNK,
    Quality,
    Scheme,
    fill_cache,
    full_scheme,
    make_reference,
    measure,
    published_scheme,
    run_prompt,
    tq_scheme,
)
from tq_jax.commands.output import (
    JsonTarget,
    environment,
    open_console,
    picture_option,
    progress_bar,
    refusing,
    write_json,
)
from tq_jax.commands.texts import TextFile, read_text
from tq_jax.data import persuasion
from tq_jax.models import Decoder, LanguageModel, cache_dir
from tq_jax.models.generate import time_decode

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_BITS = "8/4,4/4,3/3,2/2"
KL_BOUNDS: dict[tuple[float, float], float] = {(4, 4): 0.008, (3, 3): 0.03, (2, 2): 0.2}
"""Mean KL that the default model and text must stay below."""

PPL_BOUND = 0.01
"""Relative change of perplexity that K4/V4 must stay below."""

PREFIX, NEW_TOKENS = 1024, 32
QUESTIONS = {
    True: "What is the name of Sir Walter Elliot's home?",
    False: "What is this text about? Answer in one sentence.",
}
"""The question asked about the shipped text (True) and about any other."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One scheme, measured.

    Attributes:
        scheme: What was measured.
        quality: Against full precision.
        ratio_compressed: bfloat16 bytes over stored bytes of a compressed token.
        ratio_total: The same for the whole cache at the demo's length, everything it owns counted.
        nbytes: Bytes of that cache.
        tokens_per_second: Decoding speed; None if nothing was generated.
        answer: Generated text; None if nothing was generated.
    """

    scheme: Scheme
    quality: Quality
    ratio_compressed: float
    ratio_total: float
    nbytes: int
    tokens_per_second: float | None = None
    answer: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        scheme = self.scheme
        return {
            "scheme": scheme.name,
            "label": scheme.label,
            "key_bits": scheme.key_bits,
            "value_bits": scheme.value_bits,
            "stored_bits_per_element": scheme.stored_bits,
            "ratio_compressed": self.ratio_compressed,
            "ratio_total": self.ratio_total,
            "bytes": self.nbytes,
            **dataclasses.asdict(self.quality),
            "tokens_per_second": self.tokens_per_second,
            "answer": self.answer,
        }


def demo(
    model: ModelName = None,
    text: TextFile = None,
    bits: Annotated[str, typer.Option(help="Key/value bits of each compressed cache, comma-separated.")] = DEFAULT_BITS,
    positions: Annotated[int, typer.Option(help="Predictions compared.", min=CHUNK)] = 1024,
    question: Annotated[str | None, typer.Option(help="What to ask about the text.")] = None,
    plot: Annotated[Path, picture_option("quality and memory")] = Path("tq-jax-demo.png"),
    json: JsonTarget = None,
) -> None:
    """Generate from compressed caches with a real model, and show what they save and cost.

    The same prompt, a long text and a question about it, is answered from bfloat16 and from compressed caches; and
    next-token distributions over the text are compared with full precision. TurboQuant as published stands beside this
    project's defaults at the same bits. Exits 0 only if the claims printed under the table hold.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    widths = parse_bits(bits)
    content = read_text(text) if text else persuasion()
    console = open_console(json)
    console.print(f"Loading {model or DEFAULT_MODEL} (downloaded and unpacked the first time)")
    language_model = open_model(model)
    decoder = language_model.decoder
    tokens = language_model.tokenizer.encode(content[: CHARACTERS_A_TOKEN * (PREFIX + positions)])
    forced = tokens[: PREFIX + positions + 1]
    require_tokens("the text", len(forced), positions + 2)
    require_tokens("the model's context", decoder.config.max_context, max(len(forced), PREFIX + NEW_TOKENS))
    with refusing("models"):
        schemes = make_schemes(decoder, len(forced) + NEW_TOKENS + 256, widths)
    prompt = make_prompt(language_model, tokens, question or QUESTIONS[text is None])
    with progress_bar(console) as progress:
        steps = positions // CHUNK
        task = progress.add_task("full precision", total=(len(schemes) + 1) * steps)

        def advance() -> None:
            progress.advance(task)

        reference = make_reference(decoder, forced, positions=positions, advance=advance)
        rows = []
        for scheme in schemes:
            progress.update(task, description=scheme.label)
            quality = measure(decoder, reference, scheme, advance=advance)
            row = size_row(language_model, scheme, quality)
            rows.append(row if scheme.name == "turboquant" else answer(language_model, row, prompt))
    claims = check_claims(rows, default=model is None and text is None)
    console.print(make_table(rows))
    for row in rows:
        if row.answer is not None:
            console.print(f"[bold]{row.scheme.label:>8}[/bold]  {row.answer!r}")
    for claim, holds in claims.items():
        console.print(f"{'holds' if holds else 'FAILS'}  {claim}", style=None if holds else "red")
    source = text.name if text else "persuasion"
    from tq_jax.commands import picture  # matplotlib is optional

    picture.draw(
        [row.as_dict() for row in rows], plot, title=f"{model or DEFAULT_MODEL}, {positions} positions of {source}"
    )
    console.print(f"Picture: {plot}")
    payload = {"model": model or DEFAULT_MODEL, "positions": rows[0].quality.positions} | environment()
    named = [{"text": source} | row.as_dict() for row in rows]
    write_json(payload | {"rows": named, "claims": claims, "question": question or QUESTIONS[text is None]}, json)
    if not all(claims.values()):
        raise typer.Exit(1)


def parse_bits(text: str) -> list[tuple[float, float]]:
    """Key and value bits from text like "8/4,4/4".

    Raises:
        typer.BadParameter: If the text is something else, or no cache has such bits.

    Example:
        >>> parse_bits("8/4,3.5/2")
        [(8.0, 4.0), (3.5, 2.0)]
    """
    try:
        pairs = [tuple(float(part) for part in pair.split("/")) for pair in text.split(",")]
        pairs = [(key, value) for key, value in pairs]
    except ValueError:
        raise typer.BadParameter(f"expected key/value bits like 4/4,3/3, got {text!r}") from None
    if not BITS.issuperset(itertools.chain(*pairs)):
        known = ", ".join(f"{bits:g}" for bits in sorted(BITS))
        raise typer.BadParameter(f"expected key/value bits of {known}, got {text!r}")
    return pairs


def make_schemes(decoder: Decoder, room: int, widths: Sequence[tuple[float, float]]) -> list[Scheme]:
    """Full precision, this project's caches, and those as published where keys and values have the same bits.

    Args:
        decoder: The model.
        room: Tokens that a cache can hold.
        widths: Key and value bits.
    """
    ours = [tq_scheme(decoder, room, key_bits=k, value_bits=v) for k, v in widths]
    published = [published_scheme(decoder, room, key_bits=k, value_bits=v) for k, v in widths if k == v]
    return [full_scheme(decoder, room), *ours, *published]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt that has run in full precision, right-padded to PREFIX tokens.

    Attributes:
        length: Tokens that are not padding.
        projections: See `Decoder.projections`.
        first: int32 [1], the first token of the answer.
    """

    length: int
    projections: tuple[jax.Array, jax.Array, jax.Array]
    first: jax.Array


def make_prompt(model: LanguageModel, tokens: list[int], question: str) -> Prompt:
    """Runs a chat prompt: the beginning of a text and a question about it, PREFIX tokens at most."""
    for excerpt in range(PREFIX, 0, -32):
        content = f"{model.tokenizer.decode(tokens[:excerpt])}\n\n{question}"
        with refusing("models"):
            prompt = model.tokenizer.encode_chat([{"role": "user", "content": content}])
        if len(prompt) <= PREFIX:
            break
    else:
        raise typer.BadParameter(f"expected a question of less than {PREFIX} tokens, got {len(prompt)}")
    padded = jnp.zeros((1, PREFIX), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt, jnp.int32))
    hidden, projections = run_prompt(model.decoder, padded)
    logits = model.decoder.logits(hidden[:, len(prompt) - 1 : len(prompt)])
    return Prompt(len(prompt), projections, jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32))


def size_row(model: LanguageModel, scheme: Scheme, quality: Quality) -> Row:
    """A row with its sizes, those of the whole cache taken from its arrays' shapes."""
    spec = scheme.cache
    full = full_scheme(model.decoder, spec.max_tokens).cache

    def nbytes(spec: Any) -> int:
        return jax.eval_shape(lambda: model.decoder.init_cache(spec, batch=1)).nbytes

    return Row(
        scheme=scheme,
        quality=quality,
        ratio_compressed=full.bytes_per_token() / spec.bytes_per_token(),
        ratio_total=nbytes(full) / nbytes(spec),
        nbytes=nbytes(spec),
    )


def answer(model: LanguageModel, row: Row, prompt: Prompt) -> Row:
    """Generates greedily from the row's cache; the speed is that of the decode loop alone, compilation excluded."""
    decoder = model.decoder

    def make_cache() -> tq.Cache:
        return fill_cache(decoder.init_cache(row.scheme.cache, batch=1), *prompt.projections, jnp.int32(prompt.length))

    out, count, seconds = time_decode(
        decoder, prompt.first, make_cache, max_new_tokens=NEW_TOKENS, stop_tokens=model.config.stop_tokens
    )
    length = int(count[0])
    speed = (length - 1) / seconds if length > 1 else None
    text = model.tokenizer.decode(out[0, :length].tolist())
    return dataclasses.replace(row, tokens_per_second=speed, answer=text.strip())


def check_claims(rows: list[Row], *, default: bool) -> dict[str, bool]:
    """What the demo claims, and whether it held; bounds on KL only for the default model and text."""
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


def make_table(rows: list[Row]) -> Table:
    """The rows for a reader."""
    table = Table(title="Key-value caches against full precision", title_justify="left")
    columns = ("cache", "bits", "ratio", "ratio, all", "MB", "KL", "KL 99.9 %", "same top-1", "perplexity", "tokens/s")
    for name in columns:
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    for row in rows:
        quality = row.quality
        table.add_row(
            row.scheme.label,
            f"{row.scheme.stored_bits:.2f}",
            f"{row.ratio_compressed:.2f}",
            f"{row.ratio_total:.2f}",
            f"{row.nbytes / 1e6:.1f}",
            f"{quality.kl_mean:.5f}",
            f"{quality.kl_p999:.4f}",
            f"{quality.top1:.1%}",
            f"{quality.ppl / quality.ppl_fp - 1:+.2%}",
            f"{row.tokens_per_second:.1f}" if row.tokens_per_second else "",
            style="dim" if row.scheme.name == "turboquant" else "",
        )
    return table
