"""Rivals that a user wrote, found by their names."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from tq_jax.commands.rivals.calibrated import EVERY
from tq_jax.commands.rivals.roundings import Calibrated, Rival, Rounding


def load_rivals(names: Sequence[str]) -> list[Rival]:
    """Rivals by their names; modules of the current folder can be imported.

    Args:
        names: Each "module:name" of a `Rival`.

    Raises:
        typer.BadParameter: If a name is not such a name, cannot be imported or is no rival, or if two rivals share a
            label.

    Example:
        >>> load_rivals(["tq_jax.commands.rivals.roundings:Rival"])  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ...
        typer.BadParameter: expected tq_jax.commands.rivals.roundings:Rival to be a Rival, got a type
    """
    found = [_load(name) for name in names]
    labels = [rival.label for rival in (*EVERY, *found)]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise typer.BadParameter(f"expected rivals with labels of their own, got {', '.join(twice)} twice")
    return found


def _load(name: str) -> Rival:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise typer.BadParameter(f"expected a rival as MODULE:NAME, got {name!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        rival = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"expected {name} to be importable from {here}, got {error}") from error
    if not isinstance(rival, Rival):
        raise typer.BadParameter(f"expected {name} to be a Rival, got a {type(rival).__name__}")
    for part in (rival.key, rival.value):
        if not isinstance(part, Rounding | Calibrated):
            raise typer.BadParameter(f"expected key and value of {name} to be Roundings, got a {type(part).__name__}")
    return rival
