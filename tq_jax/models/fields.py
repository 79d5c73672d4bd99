"""JSON objects, and checks of the fields of model files before they are used."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """The values that a field may hold.

    Attributes:
        words: Their description in an error message.
        holds: Tells whether a value is one of them.
    """

    words: str
    holds: Callable[[Any], bool]


def either(*kinds: Kind) -> Kind:
    """Values of any of several kinds."""
    return Kind(" or ".join(kind.words for kind in kinds), lambda value: any(kind.holds(value) for kind in kinds))


def list_of(kind: Kind) -> Kind:
    """Lists whose items are all of one kind."""
    words = f"a list whose items are each {kind.words}"
    return Kind(words, lambda value: isinstance(value, list) and all(map(kind.holds, value)))


def table_of(kind: Kind) -> Kind:
    """Tables whose values are all of one kind."""
    words = f"a table whose values are each {kind.words}"
    return Kind(words, lambda value: TABLE.holds(value) and all(map(kind.holds, value.values())))


def table_with(*names: str) -> Kind:
    """Tables that hold a text under each of the names."""
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
    """Refuse fields whose value is of another kind; a missing field and None pass.

    Args:
        source: The file or part of a file that holds the fields, for messages.
        fields: Name to value.
        kinds: Name to the kind of its value. Fields of other names may hold anything.

    Raises:
        ValueError: If a field holds a value of another kind.

    Example:
        >>> check_fields("config.json", {"vocab_size": "64"}, {"vocab_size": SIZE})
        Traceback (most recent call last):
        ValueError: config.json: expected vocab_size to be a positive whole number below 2**31, got '64'
    """
    for name in sorted(fields.keys() & kinds.keys()):
        value, kind = fields[name], kinds[name]
        if value is not None and not kind.holds(value):
            raise ValueError(f"{source}: expected {name} to be {kind.words}, got {reprlib.repr(value)}")


def required(config: Mapping[str, Any], name: str, *, default: Any = None) -> Any:
    """The value of a field of a `config.json`, or its default.

    Raises:
        ValueError: If the field is missing or null, and has no default.
    """
    value = given(config, name, default)
    if value is None:
        raise ValueError(f"config.json: expected the field {name!r}, got none")
    return value


def given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of a field; the default if it is missing or null."""
    return default if config.get(name) is None else config[name]


def refuse(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse the value of a field of a `config.json` unless it is one of those allowed.

    Raises:
        NotImplementedError: If it is another one.
    """
    if value not in allowed:
        raise NotImplementedError(f"config.json {name}={value!r}: supported is {' or '.join(map(repr, allowed))}")


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that holds one JSON object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file does not hold one JSON object.
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
