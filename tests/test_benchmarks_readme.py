"""The index of recorded figures names all of them, and commands that exist."""

import re
from pathlib import Path

from typer.testing import CliRunner

from tq_jax import cli

FOLDER = Path(__file__).parents[1] / "benchmarks"
TEXT = (FOLDER / "README.md").read_text("utf-8")


def test_names_every_file_and_script():
    assert sorted(re.findall(r"\(results/(\S+\.json)\)", TEXT)) == sorted(p.name for p in FOLDER.glob("results/*"))
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    assert scripts == set(re.findall(r"`(\w+\.py)`", TEXT)) - {"config.py"}


def test_commands_and_options_exist():
    for command, options in re.findall(r"tq-jax (\w+)((?: [^`\n]+)?)", TEXT):
        shown = CliRunner().invoke(cli.build([command]), [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0
        for option in re.findall(r"--[a-z]+", options):
            assert option in shown.output, f"{command} {option}"
