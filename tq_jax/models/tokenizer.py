"""Tokenizers from a `tokenizer.json`, and chat templates."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq_jax.models.added_tokens import apply_settings, read_settings, special_fields
from tq_jax.models.chat_template import render_chat


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its chat template.

    Attributes:
        backend: A `tokenizers.Tokenizer`.
        chat_template: Jinja source that renders a conversation; None if the model has no template.
        special: Texts of the special tokens that templates name: `bos_token`, `eos_token` and others of the model.
    """

    backend: Any
    chat_template: str | None
    special: Mapping[str, str]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, whole and without padding.

        Special tokens that are written out in the text are recognised, unless the model's settings say
        `split_special_tokens`.

        Args:
            text: The text.
            add_special_tokens: Whether to add the tokens that the model expects around a text (for many models, a first
                token).

        Returns:
            Token ids.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids.

        Args:
            tokens: Token ids.
            skip_special_tokens: Whether to leave special tokens out of the text.

        Returns:
            The text. Incomplete UTF-8 becomes the replacement character.
        """
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=skip_special_tokens)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation by the model's own chat template.

        Args:
            messages: The conversation; each message has "role" ("system", "user" or "assistant") and "content".
            add_generation_prompt: Whether the text ends where the assistant's answer starts.

        Returns:
            The text of the conversation.

        Raises:
            ValueError: If the model has no chat template or a faulty one, or if the template refuses the conversation
                or fails with it.
        """
        if self.chat_template is None:
            raise ValueError("chat_prompt: expected a model with a chat template, got one without")
        return render_chat(self.chat_template, messages, add_generation_prompt=add_generation_prompt, **self.special)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation: `chat_prompt`, encoded. The template writes the special tokens itself.

        Args:
            messages: The conversation, see `chat_prompt`.
            add_generation_prompt: Whether the tokens end where the assistant's answer starts.

        Returns:
            Token ids.

        Raises:
            ValueError: As `chat_prompt` does.
        """
        text = self.chat_prompt(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `load_tokenizer` reads back.

        Args:
            directory: An existing directory.
        """
        self.backend.save(str(directory / "tokenizer.json"))
        config = {"chat_template": self.chat_template, **special_fields(self.special)}
        if self.backend.encode_special_tokens:
            config["split_special_tokens"] = True
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from a Hugging Face directory.

    Args:
        directory: Holds `tokenizer.json`. `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and
            `chat_template.jinja` are read if they exist. Truncation and padding of `tokenizer.json` are left out.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: If there is no `tokenizer.json`.
        NotImplementedError: If `add_prefix_space` of the settings contradicts `tokenizer.json`.
        ValueError: If a file is corrupt or truncated, or if an added token cannot get the id that a file gives it.
    """
    import tokenizers

    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {directory}")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{path}: expected a tokenizer, got a corrupt or truncated file ({error})") from error
    settings = read_settings(directory)
    apply_settings(backend, settings)
    template = directory / "chat_template.jinja"
    return Tokenizer(
        backend=backend,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else _default(settings.config),
        special=settings.texts,
    )


def _default(config: Mapping[str, Any]) -> str | None:
    """The chat template of `tokenizer_config.json`: its only template, or the one named "default"."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template
