"""Everything that documents name exists: recorded files, scripts, tests, links, pictures, commands and options."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

from tq_jax.commands import cli

ROOT = Path(__file__).parents[1]
README, BENCHMARKS = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
DOCUMENTS = [README, BENCHMARKS, *sorted((ROOT / "docs").glob("*.md"))]


def documents(function):
    return pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))(function)


def code(text):
    """Lines of shell blocks without comments, and the parts of prose between backticks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [line.split("  #")[0] for line in lines] + [
        part.replace("\n", " ") for part in re.findall(r"`([^`]+)`", prose)
    ]


def first_column(text):
    return [link for line in text.splitlines() if line.startswith("| [") for link in targets(line.split(" | ")[0])]


def targets(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_tables_name_every_recorded_file_and_every_script():
    named = first_column(BENCHMARKS.read_text("utf-8"))
    folder = BENCHMARKS.parent
    results = [f"results/{path.name}" for path in folder.glob("results/*")]
    scripts = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(results + scripts)


@documents
def test_links_and_pictures_exist(path):
    missing = [link for link in targets(path.read_text("utf-8")) if not re.match(r"https?://|#", link)]
    assert [link for link in missing if not (path.parent / link.split("#")[0]).exists()] == []


def test_every_picture_is_shown():
    shown = {(path.parent / link).resolve() for path in DOCUMENTS for link in targets(path.read_text("utf-8"))}
    assert [path.name for path in sorted((ROOT / "docs").glob("*.png")) if path not in shown] == []


@documents
def test_options_of_commands_exist(path):
    commands = [part for part in code(path.read_text("utf-8")) if "tq-jax " in part]
    for command in commands:
        name, *rest = shlex.split(command.split("tq-jax ", 1)[1])
        assert name in cli.commands(), command
        known = {option for parameter in parameters(name) for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, command


def parameters(name):
    application = typer.main.get_command(cli.build([name]))
    return application.commands[name].params  # pyright: ignore[reportAttributeAccessIssue]


def test_options_of_scripts_exist():
    commands = [part for part in code(BENCHMARKS.read_text("utf-8")) if "benchmarks/" in part]
    assert commands
    shared = (ROOT / "benchmarks" / "jobs.py").read_text("utf-8")
    for command in commands:
        script, rest = re.search(r"(benchmarks/\w+\.py)(.*)", command).groups()  # pyright: ignore[reportOptionalMemberAccess]
        source = (ROOT / script).read_text("utf-8") + shared
        assert [word for word in re.findall(r"--[\w-]+", rest) if f'"{word}"' not in source] == [], command


@documents
def test_named_tests_exist(path):
    named = [word for part in code(path.read_text("utf-8")) for word in re.findall(r"\btests/[\w/.]+", part)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_named_markers_exist():
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]["markers"]
    known = {marker.split(":")[0] for marker in markers}
    commands = [part for path in DOCUMENTS for part in code(path.read_text("utf-8")) if "pytest" in part]
    named = {marker for command in commands for marker in re.findall(r"pytest(?: .*)? -m (\w+)", command)}
    assert named <= known
