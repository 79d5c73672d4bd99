"""Numbers of NumPy and other libraries as Python's own, which specs compare, hash and write to files."""

import numbers
import operator
from typing import Any

import numpy as np


def whole(name: str, value: Any) -> int:
    """An integer of any library as Python's own.

    Args:
        name: What the integer is, for messages.
        value: The integer.

    Raises:
        ValueError: For anything else, such as True, or a float, whose fraction would be cut off.

    Example:
        >>> whole("window", np.int64(64))
        64
        >>> whole("window", 64.0)
        Traceback (most recent call last):
        ValueError: expected window as an integer, got 64.0
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"expected {name} as an integer, got {value!r}") from error


def number(name: str, value: Any) -> float:
    """A number of any library as Python's own int or float; raises as `whole` does."""
    if hasattr(value, "__index__"):
        return whole(name, value)
    if not isinstance(value, numbers.Real):
        raise ValueError(f"expected {name} as a number, got {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """A truth value of Python or NumPy as Python's own; raises ValueError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"expected {name} as True or False, got {value!r}")
    return bool(value)


def make_plain(spec: Any, **kinds: Any) -> None:
    """Replaces attributes of a frozen dataclass by Python's own values; None stays None.

    Args:
        spec: The dataclass.
        **kinds: `whole`, `number` or `flag`, by the attribute's name.

    Raises:
        ValueError: For a value of another kind.
    """
    for name, kind in kinds.items():
        if (value := getattr(spec, name)) is not None:
            object.__setattr__(spec, name, kind(name, value))
