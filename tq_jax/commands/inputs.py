"""The inputs of commands: a model, a text, and the first tokens of a text."""

from pathlib import Path

import jax
import typer

from tq_jax.commands.options import refusing
from tq_jax.models import LanguageModel, cache_dir, load_model

CHARACTERS_PER_TOKEN = 12
"""Characters that are tokenized per token that is needed; texts have fewer characters per token."""


def keep_compiled() -> None:
    """Makes JAX keep compiled functions on disk, so that a second run of a command starts faster."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))


def open_model(name: str | None, *, dtype: str = "float32") -> LanguageModel:
    """Loads a model; see `tq_jax.models.load_model`.

    Args:
        name: Value of the `--model` option.
        dtype: Type of parameters and activations.

    Raises:
        typer.BadParameter: If there is no such model, or it cannot be read, downloaded or run.
    """
    with refusing("models"):
        return load_model(name, dtype=dtype)


def read_text(path: Path) -> str:
    """The text of a file.

    Args:
        path: The file.

    Raises:
        typer.BadParameter: If the file cannot be read, is not in UTF-8, or has nothing but space in it.
    """
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"expected a text in UTF-8, got {path} ({error})") from error
    if not content.strip():
        raise typer.BadParameter(f"expected a text, got {path}, which is empty")
    return content


def first_tokens(model: LanguageModel, name: str, content: str, count: int) -> list[int]:
    """The first tokens of a text.

    Args:
        model: The model whose tokenizer is used.
        name: Name of the text.
        content: The text.
        count: Number of tokens.

    Raises:
        typer.BadParameter: If the text or the model's context is shorter.
    """
    tokens = model.tokenizer.encode(content[: CHARACTERS_PER_TOKEN * count])[:count]
    require_tokens(f"text {name!r}", len(tokens), count)
    require_tokens("the model's context", model.config.max_context, count)
    return tokens


def require_tokens(what: str, found: float, least: int) -> None:
    """Rejects a text or a context that is too short.

    Args:
        what: What has tokens, or room for tokens.
        found: Number of tokens that it has.
        least: Number of tokens that are needed.

    Raises:
        typer.BadParameter: If there are fewer tokens than needed.
    """
    if found < least:
        raise typer.BadParameter(f"{what}: expected at least {least} tokens in all, got {found}")
