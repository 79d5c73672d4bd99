"""Special tokens and settings that stand beside a `tokenizer.json`, read as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq_jax.models.fields import (
    COUNT,
    FLAG,
    TABLE,
    TEXT,
    check_fields,
    either,
    list_of,
    read_json,
    table_of,
    table_with,
)

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN = either(TEXT, table_with("content"))
_KINDS = dict.fromkeys(_NAMED, _TOKEN) | {
    "chat_template": either(TEXT, list_of(table_with("name", "template"))),
    "extra_special_tokens": either(list_of(_TOKEN), table_of(_TOKEN)),
    "additional_special_tokens": list_of(_TOKEN),
    "added_tokens_decoder": table_of(table_with("content")),
    "split_special_tokens": FLAG,
    "add_prefix_space": FLAG,
}


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a `tokenizer.json` say.

    Attributes:
        source: The file that lists added tokens, for messages.
        config: Contents of `tokenizer_config.json`, {} without it.
        placed: Added tokens by their ids.
        special: Special tokens by the names under which templates know them, such as "bos_token".
        extra: Special tokens without a name.
    """

    source: Path
    config: dict[str, Any]
    placed: dict[int, Any]
    special: dict[str, Any]
    extra: list[Any]

    @property
    def texts(self) -> dict[str, str]:
        """The texts of the special tokens by name."""
        return {name: token.content for name, token in self.special.items()}


def read_settings(directory: Path) -> TokenizerSettings:
    """Read `tokenizer_config.json`, or, if it lists no added tokens, the older files beside it as well.

    Args:
        directory: Holds any of `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.

    Returns:
        The settings.

    Raises:
        ValueError: If a file is no JSON object, or a field of it holds a value of another kind.
    """
    config = _read(directory / _CONFIG)
    listed = "added_tokens_decoder" in config
    older = {} if listed else _read(directory / _MAP)
    named, unnamed = _special_tokens(config, older)
    special = {name: _token(token, special=True) for name, token in named.items()}
    extra = [_token(token, special=True) for token in unnamed]
    source = directory / (_CONFIG if listed else _ADDED)
    if listed:
        placed = _listed(source, config["added_tokens_decoder"] or {})
    else:
        placed = _added(source, {token.content for token in (*special.values(), *extra)})
    return TokenizerSettings(source, config, placed, special, extra)


def _special_tokens(config: Mapping[str, Any], older: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Special tokens by name, and those without a name. Names of the older file come first, its lists last."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = older.get("extra_special_tokens") or (not extra and older.get("additional_special_tokens")) or []
    merged = {**config, **older}
    named = {name: merged[name] for name in _NAMED if merged.get(name)}
    named |= {name: token for name, token in merged.items() if name not in _NAMED and _is_named_token(name, token)}
    unnamed: list[Any] = []
    for tokens in (extra, more):
        if TABLE.holds(tokens):
            named |= tokens
        else:
            unnamed += [token for token in tokens if token not in unnamed]
    return named, unnamed


def _listed(path: Path, tokens: Mapping[str, Any]) -> dict[int, Any]:
    """Tokens of `added_tokens_decoder` by their ids."""
    if wrong := [index for index in tokens if not index.isdecimal()]:
        raise ValueError(f"{path}: expected ids in added_tokens_decoder, got {wrong[0]!r}")
    return {int(index): _token(token, special=False) for index, token in tokens.items()}


def _added(path: Path, special: set[str]) -> dict[int, Any]:
    """Tokens of `added_tokens.json` by their ids."""
    ids = read_json(path) if path.is_file() else {}
    if wrong := [text for text, index in ids.items() if not COUNT.holds(index)]:
        raise ValueError(f"{path}: expected {wrong[0]!r} to be {COUNT.words}, got {ids[wrong[0]]!r}")
    return {index: _token(text, special=text in special) for text, index in ids.items()}


def _read(path: Path) -> dict[str, Any]:
    """The checked contents of a file, {} without it."""
    contents = read_json(path) if path.is_file() else {}
    check_fields(str(path), contents, _KINDS)
    return contents


def _is_named_token(name: str, token: Any) -> bool:
    """Whether a field names a special token of the model's own, such as "image_token"."""
    return name.endswith("_token") and _TOKEN.holds(token)


def _token(token: str | Mapping[str, Any], *, special: bool) -> Any:
    """An added token, given as text or as a table."""
    from tokenizers import AddedToken

    table = {"content": token} if isinstance(token, str) else token
    special = special or bool(table.get("special", False))
    flags = {name: bool(table[name]) for name in ("lstrip", "rstrip", "single_word") if name in table}
    normalized = bool(table.get("normalized", not special))
    return AddedToken(table["content"], special=special, normalized=normalized, **flags)


def special_fields(special: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `tokenizer_config.json` that name special tokens, given by their texts."""
    own = {name: text for name, text in special.items() if name not in _NAMED}
    named = {name: text for name, text in special.items() if name in _NAMED}
    return named | ({"extra_special_tokens": own} if own else {})


def apply_settings(backend: Any, settings: TokenizerSettings) -> None:
    """Add the tokens of the settings to a tokenizer, and switch off what would change the text that it is given.

    Args:
        backend: A `tokenizers.Tokenizer`, changed in place.
        settings: The settings of its directory.

    Raises:
        NotImplementedError: If the settings ask for a space before each text and the tokenizer adds none, or the
            other way round.
        ValueError: If an added token cannot get the id that the file gives it.
    """
    # Training scripts leave both in the file, with the sizes of their batches.
    backend.no_truncation()
    backend.no_padding()
    _require_prefix_space(backend, settings)
    backend.encode_special_tokens = bool(settings.config.get("split_special_tokens"))
    backend.add_tokens([token for _, token in sorted(settings.placed.items(), key=lambda item: item[0])])
    for index, token in settings.placed.items():
        if (found := backend.token_to_id(token.content)) != index:
            raise ValueError(
                f"{settings.source}: expected {token.content!r} to be the token {index}, got {found}: the ids of added "
                "tokens follow those of tokenizer.json without a gap"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in (*settings.special.values(), *settings.extra) if token.content not in known])


def _require_prefix_space(backend: Any, settings: TokenizerSettings) -> None:
    """Refuse a setting `add_prefix_space` that is not that of the tokenizer: releases of transformers differ on it."""
    wanted = settings.config.get("add_prefix_space")
    step = (json.loads(backend.to_str()).get("pre_tokenizer") if wanted is not None else None) or {}
    for part in step.get("pretokenizers", [step]):
        found = part.get("add_prefix_space")
        if part.get("type") == "ByteLevel" and found is not None and found != wanted:
            raise NotImplementedError(
                f"{settings.source.parent / _CONFIG}: add_prefix_space={wanted}: supported is that of tokenizer.json, "
                f"{found}; write the right one into both files"
            )
