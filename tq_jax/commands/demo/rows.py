"""Rows of `tq-jax demo`: caches measured on a text, and the answers that a model generates from them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console

from tq_jax.commands.divergence import (
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
from tq_jax.commands.options import refusing
from tq_jax.commands.output import progress_bar
from tq_jax.models import Decoder, LanguageModel
from tq_jax.models.generate import time_decode
from tq_jax.models.layer_caches import Caches, map_caches

PREFIX, NEW_TOKENS = 1024, 32
"""Tokens of the prompt, padding included, and most tokens of an answer."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Measurements of one scheme.

    Attributes:
        scheme: The scheme.
        quality: Its predictions compared with full precision.
        description: `Scheme.describe`.
        nbytes: Bytes of the whole cache at the demo's length, with every array that it owns.
        tokens_per_second: Decoding speed; None if nothing was generated.
        answer: Generated text; None if nothing was generated.
    """

    scheme: Scheme
    quality: Quality
    description: dict[str, Any]
    nbytes: int
    tokens_per_second: float | None = None
    answer: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        row = self.description | {"bytes": self.nbytes} | dataclasses.asdict(self.quality)
        return row | {"tokens_per_second": self.tokens_per_second, "answer": self.answer}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt that was run in full precision, right-padded to PREFIX tokens.

    Attributes:
        length: Number of tokens that are not padding.
        projections: Queries, keys and values of its tokens; see `Decoder.projections`.
        first: First token of the answer, int32 [1].
    """

    length: int
    projections: tuple[jax.Array, jax.Array, jax.Array]
    first: jax.Array


def make_schemes(decoder: Decoder, room: int, widths: Sequence[tuple[float, float]]) -> list[Scheme]:
    """Full precision, this project's caches, and published ones where keys and values have the same number of bits.

    Args:
        decoder: The model.
        room: Capacity of a cache row, tokens.
        widths: Pairs of key and value bits.
    """
    ours = [tq_scheme(decoder, room, key_bits=k, value_bits=v) for k, v in widths]
    published = [published_scheme(decoder, room, key_bits=k, value_bits=v) for k, v in widths if k == v]
    return [full_scheme(decoder, room), *ours, *published]


def make_prompt(model: LanguageModel, tokens: list[int], question: str) -> Prompt:
    """Runs a chat prompt of at most PREFIX tokens: the beginning of a text, and a question about it.

    Args:
        model: The model.
        tokens: The text.
        question: The question.

    Raises:
        typer.BadParameter: If the question alone is too long, or the model has no chat template.
    """
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


def measure_rows(
    model: LanguageModel, schemes: Sequence[Scheme], forced: list[int], positions: int, prompt: Prompt, console: Console
) -> list[Row]:
    """Measures every scheme on a text; every scheme but published ones also answers the prompt.

    Args:
        model: The model.
        schemes: What to measure.
        forced: The text.
        positions: Number of predictions to compare.
        prompt: What to answer.
        console: Where to show progress.
    """
    decoder, rows = model.decoder, []
    with progress_bar(console) as progress:
        task = progress.add_task("full precision", total=(len(schemes) + 1) * (positions // CHUNK))

        def advance() -> None:
            progress.advance(task)

        reference = make_reference(decoder, forced, positions=positions, advance=advance)
        for scheme in schemes:
            progress.update(task, description=scheme.label)
            quality = measure(decoder, reference, scheme, advance=advance)
            row = Row(scheme, quality, scheme.describe(decoder), scheme.nbytes(decoder))
            rows.append(row if scheme.name == "turboquant" else answer(model, row, prompt))
    return rows


def answer(model: LanguageModel, row: Row, prompt: Prompt) -> Row:
    """Generates greedily from the cache of a row.

    Args:
        model: The model.
        row: A row without an answer.
        prompt: What to answer.

    Returns:
        The row with the answer, and with the speed of the decode loop alone, compilation excluded.
    """
    decoder = model.decoder

    def make_cache() -> Caches:
        fill = functools.partial(fill_cache, length=jnp.int32(prompt.length))
        return map_caches(fill, decoder.init_cache(row.scheme.cache, batch=1), *prompt.projections)

    out, count, seconds = time_decode(
        decoder, prompt.first, make_cache, max_new_tokens=NEW_TOKENS, stop_tokens=model.config.stop_tokens
    )
    length = int(count[0])
    speed = (length - 1) / seconds if length > 1 else None
    text = model.tokenizer.decode(out[0, :length].tolist())
    return dataclasses.replace(row, tokens_per_second=speed, answer=text.strip())
