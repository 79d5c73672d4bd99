"""JSON objects, and what the fields of model files may hold, checked before anything is made of them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a field may hold.

    Attributes:
        words: as an error says it.
        holds: whether a value is one.
    """

    words: str
    holds: Callable[[Any], bool]


def either(*kinds: Kind) -> Kind:
    """What holds any of some kinds."""
    return Kind(" or ".join(kind.words for kind in kinds), lambda value: any(kind.holds(value) for kind in kinds))


def list_of(kind: Kind) -> Kind:
    """A list, each of whose items is of a kind."""
    words = f"a list whose items are each {kind.words}"
    return Kind(words, lambda value: isinstance(value, list) and all(map(kind.holds, value)))


def table_with(*names: str) -> Kind:
    """A table that has texts of some names."""
    words = f"a table with the text{'s' * (len(names) > 1)} {' and '.join(names)}"
    return Kind(words, lambda value: TABLE.holds(value) and all(TEXT.holds(value.get(name)) for name in names))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


COUNT = Kind("a whole number below 2**31", lambda value: _is_whole(value) and 0 <= value < 2**31)
SIZE = Kind("a positive whole number below 2**31", lambda value: COUNT.holds(value) and value > 0)
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a positive number below 1e300", lambda value: _is_number(value) and 0 < value < 1e300)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
TABLE = Kind("a table", lambda value: isinstance(value, Mapping))
FILES = Kind(
    "a table of file names",
    lambda value: TABLE.holds(value) and all(TEXT.holds(file) and Path(file).name == file for file in value.values()),
)


def check_fields(source: str, fields: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Refuses fields that hold something else; those that are missing, or None, pass.

    Args:
        source: where they come from, for messages.
        fields: name to value.
        kinds: name to what it may hold; other names may hold anything.

    Raises:
        ValueError: a field holds something else.

    Example:
        >>> check_fields("config.json", {"vocab_size": "64"}, {"vocab_size": SIZE})
        Traceback (most recent call last):
        ValueError: config.json: expected vocab_size to be a positive whole number below 2**31, got '64'
    """
    for name in sorted(fields.keys() & kinds.keys()):
        value, kind = fields[name], kinds[name]
        if value is not None and not kind.holds(value):
            raise ValueError(f"{source}: expected {name} to be {kind.words}, got {reprlib.repr(value)}")


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a corrupt or truncated file ({error})") from error
    if not isinstance(out, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(out).__name__}")
    return out
