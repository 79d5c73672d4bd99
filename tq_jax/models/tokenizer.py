"""Text to token ids and back: byte-level BPE from GGUF metadata or ``tokenizer.json``, and chat templates."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its chat template.

    Attributes:
        backend: a ``tokenizers.Tokenizer``.
        chat_template: Jinja source that renders a conversation, if the model has one.
        special: texts of ``bos_token`` and ``eos_token``, as templates name them.
    """

    backend: Any
    chat_template: str | None
    special: Mapping[str, str]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised.

        Args:
            text: what to encode.
            add_special_tokens: add what the model expects around a text (for many, a first token).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; incomplete UTF-8 becomes the replacement character."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=skip_special_tokens)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation by the model's own chat template.

        Args:
            messages: each with "role" ("system", "user" or "assistant") and "content".
            add_generation_prompt: end where the assistant's answer starts.

        Raises:
            ValueError: the model has no chat template, or the template refuses the conversation.
        """
        if self.chat_template is None:
            raise ValueError("chat_prompt: expected a model with a chat template, got one without")
        return _render(
            self.chat_template, messages=messages, add_generation_prompt=add_generation_prompt, **self.special
        )

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `chat_prompt`; the template writes its own special tokens."""
        text = self.chat_prompt(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write the files that `load_tokenizer` reads back."""
        self.backend.save(str(directory / "tokenizer.json"))
        config = {"chat_template": self.chat_template, **self.special}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Load ``tokenizer.json``, with ``tokenizer_config.json`` and ``chat_template.jinja`` where there are such.

    Raises:
        FileNotFoundError: there is no ``tokenizer.json``.
        ValueError: a file is corrupt.
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
    settings = directory / "tokenizer_config.json"
    try:
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{settings}: expected JSON, got a corrupt or truncated file ({error})") from error
    template = directory / "chat_template.jinja"
    return Tokenizer(
        backend=backend,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else _default(config),
        special={name: _text(config[name]) for name in ("bos_token", "eos_token") if config.get(name)},
    )


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuild a byte-level BPE tokenizer from GGUF metadata.

    Args:
        metadata: key to value, as `gguf_file.read_gguf` returns it.

    Raises:
        NotImplementedError: another tokenizer model or pre-tokenizer.
        ValueError: the vocabulary or the merges are missing or contradict each other.
    """
    import tokenizers
    from tokenizers import decoders, models

    if (model := metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise NotImplementedError(f"tokenizer.ggml.model={model!r}: supported is 'gpt2' (byte-level BPE)")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise NotImplementedError(f"tokenizer.ggml.pre={pre!r}: supported are {sorted(_PRE_TOKENIZERS)}")
    vocabulary, merges, kinds = (_list(metadata, name) for name in ("tokens", "merges", "token_type"))
    ids = {token: index for index, token in enumerate(vocabulary)}
    if len(ids) != len(vocabulary) or len(kinds) != len(vocabulary):
        raise ValueError(
            f"tokenizer.ggml.tokens: expected as many distinct tokens as types, got {len(ids)} distinct of "
            f"{len(vocabulary)} and {len(kinds)} types"
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"tokenizer.ggml.merges: expected pairs of known tokens, got {error}") from error
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        special = kind == _CONTROL
        add(
            [
                tokenizers.AddedToken(t, special=special, normalized=False)
                for t, k in zip(vocabulary, kinds, strict=True)
                if k == kind
            ]
        )
    special = {
        f"{name}_token": vocabulary[metadata[key]]
        for name in ("bos", "eos")
        if (key := f"tokenizer.ggml.{name}_token_id") in metadata
    }
    backend.post_processor = _post_processor(metadata, special, ids)
    return Tokenizer(backend=backend, chat_template=metadata.get("tokenizer.chat_template"), special=special)


def _byte_level() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_byte_level() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


_PRE_TOKENIZERS = {"gpt-2": _byte_level, "smollm": _digits_then_byte_level}


def _post_processor(metadata: Mapping[str, Any], special: Mapping[str, str], ids: Mapping[str, int]) -> Any:
    from tokenizers import processors

    template = ["$A"]
    for name, at in (("bos", 0), ("eos", len(template) + 1)):
        if metadata.get(f"tokenizer.ggml.add_{name}_token", False):
            if f"{name}_token" not in special:
                raise ValueError(f"tokenizer.ggml.{name}_token_id: expected an id to add to every text, got none")
            template.insert(at, special[f"{name}_token"])
    return processors.TemplateProcessing(
        single=template, special_tokens=[(token, ids[token]) for token in template if token != "$A"]
    )


def _list(metadata: Mapping[str, Any], name: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not value:
        raise ValueError(f"tokenizer.ggml.{name}: expected a list, got {type(value).__name__}")
    return value


def _default(config: Mapping[str, Any]) -> str | None:
    """The template of ``tokenizer_config.json``: one string, or named ones of which "default" counts."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _render(source: str, **variables: Any) -> str:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    # The options of transformers' apply_chat_template: templates are written for them.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source).render(**variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: expected a conversation that it accepts, got {error}") from error
