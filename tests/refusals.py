"""The messages of commands for mistakes."""

from typer.testing import CliRunner

from tq_jax.commands import cli


def refused(command, *arguments):
    """The message of a command for wrong arguments, on one line."""
    result = CliRunner().invoke(cli.build([command]), [command, *arguments], env={"COLUMNS": "2000"})
    assert result.exit_code == 2, result.output
    return result.output
