"""The `tq-jax` command line.

A command is a typed function in the room it belongs to; COMMANDS names it, and only the room that is asked for is
imported.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from importlib import metadata

import typer

COMMANDS = {
    "demo": "tq_jax.commands.demo.command:demo",
    "validate": "tq_jax.commands.validate.command:validate",
    "eval": "tq_jax.commands.eval.command:evaluate",
    "needle": "tq_jax.commands.needle.command:needle",
    "audit": "tq_jax.commands.audit.command:audit",
    "bench": "tq_jax.commands.bench.command:bench",
    "gate": "tq_jax.commands.gate.command:gate",
    "search": "tq_jax.commands.search.command:search",
    "inspect": "tq_jax.commands.inspect.command:inspect_file",
    "doctor": "tq_jax.commands.doctor.command:doctor",
}
"""Name of each command of this package and where its function is, in the order of the help text."""

GROUP = "tq_jax.commands"
"""Group of entry points by which packages that build on this one add commands of their own."""


def commands() -> dict[str, str]:
    """Every command and where its function is: this package's, then those that installed packages add.

    Example:
        >>> commands()["demo"]
        'tq_jax.commands.demo.command:demo'
    """
    return COMMANDS | {point.name: point.value for point in metadata.entry_points(group=GROUP)}


def build(names: Iterable[str] | None = None) -> typer.Typer:
    """Builds the application.

    Args:
        names: Commands to register; the others' modules are not imported. All by default.

    Returns:
        The application.

    Raises:
        KeyError: If there is no command of such a name.

    Example:
        >>> from typer.testing import CliRunner
        >>> CliRunner().invoke(build(["validate"]), ["validate", "--help"]).exit_code
        0
    """
    app = typer.Typer(name="tq-jax", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def root() -> None:
        """TurboQuant KV-cache compression in JAX. Commands measure what they claim and exit 0 only if it holds."""

    known = commands()
    for name in known if names is None else names:
        module, function = known[name].split(":")
        command = getattr(importlib.import_module(module), function)
        app.command(name, help=_help(command))(command)
    return app


def main() -> None:
    """Runs the command line on the arguments of the process."""
    chosen = [name for name in sys.argv[1:2] if name in commands()]
    build(chosen or None)(prog_name="tq-jax")


def _help(command: Callable) -> str:
    """The docstring down to its first section (Args, Raises, ...)."""
    lines = inspect.cleandoc(command.__doc__ or "").splitlines()
    sections = (i for i, line in enumerate(lines) if line in ("Args:", "Returns:", "Raises:", "Example:"))
    return "\n".join(lines[: next(sections, len(lines))]).strip()
