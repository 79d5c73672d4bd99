"""The `tq-jax` command line.

Every command is a typed function in the folder of its name. COMMANDS says where; only the module of the command that is
asked for is imported.
"""

import errno
import importlib
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
"""Name and function of each command of this package, in the order of the help text."""

GROUP = "tq_jax.commands"
"""Entry-point group by which other packages add commands."""


def commands() -> dict[str, str]:
    """Name and function of every command: first this package's commands, then commands of other installed packages.

    Example:
        >>> commands()["demo"]
        'tq_jax.commands.demo.command:demo'
    """
    return COMMANDS | {point.name: point.value for point in metadata.entry_points(group=GROUP)}


class Group(TyperGroup):
    """A group of commands that says in one sentence why a command ended without a result."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; a full disk and an interruption are said.

        Raises:
            typer.Exit: If the disk is full.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            resumes = any(option.name == "resume" for option in getattr(command, "params", ()))
            kept = " A file of --json has all rows so far; --resume goes on with them." if resumes else ""
            typer.echo(f"Interrupted.{kept}", err=True)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" for {error.filename}" if error.filename else ""
            typer.echo(f"{error.strerror}{where}: the output is incomplete.", err=True)
            raise typer.Exit(1) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first argument names.

        Raises:
            click.UsageError: If there is no such command.
        """
        if self.get_command(ctx, args[0]) is None:
            ctx.fail(
                f"expected a command among {', '.join(self.list_commands(ctx))}, got {args[0]!r}; a command of another "
                f"package is found once that package is installed (entry-point group {GROUP})"
            )
        return super().resolve_command(ctx, args)


def build(names: Iterable[str] | None = None) -> typer.Typer:
    """Builds the application.

    Args:
        names: Commands to register; modules of other commands are not imported. All commands by default.

    Returns:
        The application.

    Raises:
        KeyError: If there is no command of such a name.

    Example:
        >>> from typer.testing import CliRunner
        >>> CliRunner().invoke(build(["validate"]), ["validate", "--help"]).exit_code
        0
    """
    app = typer.Typer(
        name="tq-jax", cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        """TurboQuant KV-cache compression in JAX. Commands measure what they claim and exit 0 only if it holds."""

    known = commands()
    for name in known if names is None else names:
        command = _load(name, known[name])
        app.command(name, help=_help(command))(command)
    return app


def _load(name: str, place: str) -> Callable:
    """The function of a command; a command of another package that cannot be imported says so when it is called."""
    module, function = place.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        if name in COMMANDS:
            raise
        reason = f"{name} is not available: {error}"

    def unavailable() -> None:
        raise typer.BadParameter(reason)

    unavailable.__doc__ = reason
    return unavailable


def main(prog_name: str = "tq-jax") -> None:
    """Runs the command line on the arguments of the process.

    Args:
        prog_name: Name of the program in help texts and messages.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a text of a model may have letters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    chosen = [name for name in sys.argv[1:2] if name in commands()]
    build(chosen or None)(prog_name=prog_name)


def _print_version(asked: bool) -> bool:
    """Prints the version of this package and exits, if `--version` is given."""
    if asked:
        typer.echo(metadata.version("tq-jax"))
        raise typer.Exit
    return asked


def _help(command: Callable) -> str:
    """The docstring down to its first section (Args, Raises, ...), one line per paragraph: the terminal wraps it."""
    text = inspect.cleandoc(command.__doc__ or "")
    text = re.split(r"^(?:Args|Returns|Raises|Example):$", text, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
