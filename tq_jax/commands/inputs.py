"""What commands are given: a model, and the beginning of a text in its tokens."""

from typing import Annotated

import typer

from tq_jax.commands.output import refusing
from tq_jax.models import LanguageModel, load_model

CHARACTERS_A_TOKEN = 12

ModelName = Annotated[
    str | None, typer.Option(help="GGUF file or Hugging Face directory; SmolLM2-135M-Instruct by default.")
]
"""Type of the `--model` option."""


def open_model(name: str | None) -> LanguageModel:
    """See `load_model`.

    Args:
        name: Value of the `--model` option.

    Raises:
        typer.BadParameter: If there is no such model, or it cannot be read, downloaded or run.
    """
    with refusing("models"):
        return load_model(name)


def first_tokens(model: LanguageModel, name: str, content: str, count: int) -> list[int]:
    """The beginning of a text.

    Args:
        model: Whose tokens.
        name: Name of the text.
        content: The text.
        count: How many tokens.

    Raises:
        typer.BadParameter: If the text or the model's context is shorter.
    """
    tokens = model.tokenizer.encode(content[: CHARACTERS_A_TOKEN * count])[:count]
    require_tokens(f"text {name!r}", len(tokens), count)
    require_tokens("the model's context", model.config.max_context, count)
    return tokens


def require_tokens(what: str, found: float, least: int) -> None:
    """Rejects what is too short.

    Args:
        what: What has tokens, or room for them.
        found: How many.
        least: How many are needed.

    Raises:
        typer.BadParameter: If there are fewer.
    """
    if found < least:
        raise typer.BadParameter(f"{what}: expected at least {least} tokens in all, got {found}")
