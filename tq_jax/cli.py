"""The `tq-jax` command line.

A command is a typed function in the room it belongs to; COMMANDS names it, and only the room that is asked for is
imported.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable

import typer

COMMANDS = {
    "demo": "tq_jax.evaluate.demo:demo",
    "validate": "tq_jax.evaluate.distortion:validate",
    "eval": "tq_jax.evaluate.eval:evaluate",
    "needle": "tq_jax.evaluate.needle:needle",
    "audit": "tq_jax.evaluate.audit:audit",
    "bench": "tq_jax.bench.command:bench",
    "gate": "tq_jax.evaluate.gate:gate",
    "search": "tq_jax.evaluate.search:search",
    "inspect": "tq_jax.inspection:inspect_file",
    "hf": "interop.hf_report:hf",
    "doctor": "tq_jax.doctor:doctor",
}
"""Name of each command and where its function is, in the order of the help text."""


def build(names: Iterable[str] = tuple(COMMANDS)) -> typer.Typer:
    """Builds the application.

    Args:
        names: Commands to register; the others' modules are not imported.

    Returns:
        The application.

    Raises:
        KeyError: If COMMANDS has no such name.

    Example:
        >>> from typer.testing import CliRunner
        >>> CliRunner().invoke(build(["validate"]), ["validate", "--help"]).exit_code
        0
    """
    app = typer.Typer(name="tq-jax", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def root() -> None:
        """TurboQuant KV-cache compression in JAX. Commands measure what they claim and exit 0 only if it holds."""

    for name in names:
        module, function = COMMANDS[name].split(":")
        command = getattr(importlib.import_module(module), function)
        app.command(name, help=_help(command))(command)
    return app


def main() -> None:
    """Runs the command line on the arguments of the process."""
    chosen = [name for name in sys.argv[1:2] if name in COMMANDS]
    build(chosen or COMMANDS)(prog_name="tq-jax")


def _help(command: Callable) -> str:
    """The docstring down to its first section (Args, Raises, ...)."""
    lines = inspect.cleandoc(command.__doc__ or "").splitlines()
    sections = (i for i, line in enumerate(lines) if line in ("Args:", "Returns:", "Raises:", "Example:"))
    return "\n".join(lines[: next(sections, len(lines))]).strip()
