import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tq_jax import cli
from tq_jax.data import persuasion
from tq_jax.evaluate import audit, distortion
from tq_jax.evaluate.claims import Claim

MODULES = {"validate": distortion, "audit": audit}


def passing():
    """A check that holds."""
    return [Claim("holds", 1.0, ">=", 1.0)]


def failing():
    """A check that does not."""
    return [Claim("does not hold", 0.0, ">=", 1.0)]


def run(*arguments):
    return CliRunner().invoke(cli.build(MODULES), list(arguments))


@pytest.mark.parametrize("command", MODULES)
def test_exit_code_says_whether_all_claims_hold(command, monkeypatch):
    monkeypatch.setattr(MODULES[command], "CHECKS", (passing,))
    assert run(command).exit_code == 0
    monkeypatch.setattr(MODULES[command], "CHECKS", (passing, failing))
    assert run(command).exit_code == 1


@pytest.mark.parametrize("command", MODULES)
def test_json_on_standard_output_is_one_object(command, monkeypatch):
    monkeypatch.setattr(MODULES[command], "CHECKS", (passing, failing))
    result = run(command, "--json", "-")
    claims = json.loads(result.stdout)["claims"]
    assert [(c["name"], c["ok"]) for c in claims] == [("holds", True), ("does not hold", False)]
    assert "1 of 2 hold" in result.stderr


def test_json_to_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(distortion, "CHECKS", (passing,))
    path = tmp_path / "out.json"
    result = run("validate", "--json", str(path))
    assert result.exit_code == 0
    assert json.loads(path.read_text())["claims"][0]["figure"] == 1.0
    assert "1 of 1 hold" in result.stdout


def test_a_missing_folder_is_refused_before_the_work(tmp_path):
    result = run("validate", "--json", str(tmp_path / "missing" / "out.json"))
    assert result.exit_code == 2
    assert "existing folder" in result.output


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_json(command):
    result = CliRunner().invoke(cli.build([command]), [command, "--help"], env={"COLUMNS": "160", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert "--json" in result.output
    assert "Args:" not in result.output


def test_without_a_command_there_is_help():
    result = run()
    assert "validate" in result.output
    assert "audit" in result.output


def test_an_unknown_command_fails():
    assert run("vaildate").exit_code == 2


def test_the_installed_program_runs():
    ran = subprocess.run(
        [sys.executable, "-c", "from tq_jax.cli import main; main()", "validate", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Theorems 1-3" in ran.stdout


def test_vendored_text_is_clean():
    text = persuasion()
    assert len(text) == 464_284
    assert text.startswith("Chapter 1\n\nSir Walter Elliot")
    assert text.count("\n\nChapter ") == 23
    assert "  " not in text
    assert "\n\n\n" not in text
    assert "\r" not in text
