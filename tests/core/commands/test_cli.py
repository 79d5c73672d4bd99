import io
import itertools
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from refusals import refused
from rich.console import Console
from typer.testing import CliRunner

import tq_jax
from tq_jax.commands import cli, output
from tq_jax.commands.audit import command as audit
from tq_jax.commands.claims import Claim
from tq_jax.commands.options import Resume
from tq_jax.commands.output import progress_bar, write_json
from tq_jax.commands.validate import command as distortion
from tq_jax.data import persuasion

MODULES = {"validate": distortion, "audit": audit}
PICTURES = [("demo", "--plot"), ("eval", "--plot"), ("needle", "--plot"), ("search", "--plot"), ("bench", "--png")]


def passing():
    """A check that holds."""
    return [Claim("holds", 1.0, ">=", 1.0)]


def failing():
    """A check that does not hold."""
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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_texts_that_the_terminal_cannot_show(tmp_path, monkeypatch, encoding):
    """Models write any letter: figures are written all the same, and the exit code is that of the claim."""
    name, path, shown = "caf\u00e9 \U0001f916 \ufffd \udc80", tmp_path / "out.json", io.BytesIO()
    monkeypatch.setattr(distortion, "CHECKS", (lambda: [Claim(name, 1.0, ">=", 1.0)],))
    monkeypatch.setattr(sys, "argv", ["tq-jax", "validate", "--json", str(path)])
    with monkeypatch.context() as patch, io.TextIOWrapper(shown, encoding, write_through=True) as stdout:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0 and b"caf" in shown.getvalue() and b"\\udc80" in shown.getvalue()
    assert json.loads(path.read_text())["claims"][0]["name"] == name


def test_json_to_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(distortion, "CHECKS", (passing,))
    path = tmp_path / "out.json"
    result = run("validate", "--json", str(path))
    assert result.exit_code == 0
    assert json.loads(path.read_text())["claims"][0]["figure"] == 1.0
    assert "1 of 1 hold" in result.stdout


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, a link to nowhere and a folder; the test must leave it unchanged."""
    (tmp_path / "file.png").write_text("kept")
    (tmp_path / "link.png").symlink_to(tmp_path / "missing" / "out")
    (tmp_path / "folder.png").mkdir()
    yield tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.png", "folder.png", "link.png"]
    assert (tmp_path / "file.png").read_text() == "kept"


UNWRITABLE = ["folder.png", "missing/out.png", "file.png/out.png", "link.png", f"{'x' * 300}.png", "/proc/out.png"]


@pytest.mark.parametrize("name", [*UNWRITABLE, "/proc/version", ""])
def test_figures_that_cannot_be_written_are_refused_before_the_work(name, folder):
    result = refused("validate", "--json", str(folder / name) if name else "")
    assert "expected a file that can be written, in an existing folder, got" in result


@pytest.mark.parametrize("name", ["file.png", "new.json", "/dev/null"])
def test_looking_whether_a_file_can_be_written_leaves_it_as_it_was(name, folder, monkeypatch):
    monkeypatch.setattr(distortion, "conclude", lambda *arguments: None)
    assert run("validate", "--json", str(folder / name)).exit_code == 0


def test_links_and_pipes_stay_what_they_are(tmp_path):
    path, link, pipe = tmp_path / "out.json", tmp_path / "link.json", tmp_path / "pipe"
    path.write_text("old")
    link.symlink_to(path)
    write_json({"figure": 1}, str(link))
    assert link.is_symlink()
    assert json.loads(path.read_text()) == {"figure": 1}
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json({"figure": 2}, str(pipe))
    assert json.loads(os.read(reader, 100)) == {"figure": 2}
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize(("command", "option"), PICTURES)
def test_pictures_that_cannot_be_drawn_are_refused_before_the_work(command, option, folder, monkeypatch):
    for name in UNWRITABLE:
        assert "that can be written, in an existing folder" in refused(command, option, str(folder / name))
    for name in ("out", "out.foo", "out.pgf", ".png", ""):
        assert "the name of a picture that ends in .avif, .eps" in refused(command, option, name)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert 'pip install -e ".[models]" in a checkout of tq-jax' in refused(command, option, str(folder / "out.png"))


def test_the_list_of_commands_needs_no_optional_package():
    packages = {"matplotlib", "faiss", "torch", "transformers", "gguf", "tokenizers", "safetensors", "jinja2", "triton"}
    code = "import sys; from tq_jax.commands.cli import build; build(); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not packages & set(ran.stdout.split())


@pytest.mark.parametrize("command", cli.commands())
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


def test_a_command_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: [])
    result = CliRunner().invoke(cli.build(["demo", "doctor"]), ["hf", "model"], env={"COLUMNS": "2000"})
    assert result.exit_code == 2
    assert "expected a command among demo, doctor, got 'hf'; a command of another package is found" in result.output


def test_a_command_of_another_package_that_cannot_be_imported_says_so(monkeypatch):
    point = metadata.EntryPoint("extra", "no_such_module:extra", cli.GROUP)
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: [point])
    assert cli.commands()["extra"] == "no_such_module:extra"
    app = cli.build(["doctor", "extra"])
    assert "No module named 'no_such_module'" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    result = CliRunner().invoke(app, ["extra"], env={"COLUMNS": "2000"})
    assert result.exit_code == 2
    assert "extra is not available: No module named 'no_such_module'" in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_sentence(monkeypatch):
    monkeypatch.setattr(distortion, "CHECKS", (passing,))
    found = run("validate", "--json", "/dev/full")
    assert found.exit_code == 1 and found.stderr.endswith("No space left on device: the output is incomplete.\n")


def test_an_interruption_says_where_the_rows_are(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    def with_rows(resume: Resume = False) -> None:
        interrupted()

    monkeypatch.setattr(distortion, "CHECKS", (interrupted,))
    found = run("validate")
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (130, "Interrupted.")
    monkeypatch.setattr(cli, "_load", lambda name, place: with_rows)
    found = CliRunner().invoke(cli.build(["eval"]), ["eval"])
    assert found.exit_code == 130 and "Interrupted. A file of --json has all rows so far; --resume" in found.stderr


def test_progress_of_a_run_without_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 30.0, 61.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    with progress_bar(Console(file=io.StringIO())) as progress:
        task = progress.add_task("first", total=3)
        progress.advance(task)  # after 1 second
        progress.advance(task)  # after 30
        progress.update(task, description="last")
        progress.advance(task)
    assert capsys.readouterr().err == "2 of 3: first\n3 of 3: last\n"


def test_the_version_is_printed():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"{metadata.version('tq-jax')}\n")


@pytest.mark.parametrize("columns", ["80", "120"])
def test_paragraphs_of_help_are_wrapped_once(columns):
    """Every line but the last of a paragraph is too full for the next word."""
    result = CliRunner().invoke(cli.build(["eval"]), ["eval", "--help"], env={"COLUMNS": columns, "NO_COLOR": "1"})
    text = result.output.split("Every text is")[1].split("Exits 0 only")[0]
    for paragraph in re.split(r"\n\s*\n", f"Every text is{text}"):
        lines = [line.split() for line in paragraph.splitlines() if line.strip()]
        for line, following in itertools.pairwise(lines):
            assert len(" ".join([*line, following[0]])) > int(columns) - 2  # a margin of one on each side


def test_the_installed_program_runs():
    ran = subprocess.run(
        [sys.executable, "-c", "from tq_jax.commands.cli import main; main()", "validate", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Theorems 1-3" in ran.stdout


def test_the_module_runs():
    command = [sys.executable, "-m", "tq_jax"]
    folder = Path(tq_jax.__file__).parents[1]
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": folder}
    ran = subprocess.run([*command, "validate", "--help"], **options, check=True)
    assert "Usage: python -m tq_jax validate" in ran.stdout
    assert "Theorems 1-3" in ran.stdout
    assert subprocess.run([*command, "--version"], **options, check=True).stdout.strip() == metadata.version("tq-jax")
    assert "got 'vaildate'" in subprocess.run([*command, "vaildate"], **options).stderr


def test_vendored_text_is_clean():
    text = persuasion()
    assert len(text) == 464_284
    assert text.startswith("Chapter 1\n\nSir Walter Elliot")
    assert text.count("\n\nChapter ") == 23
    assert "  " not in text
    assert "\n\n\n" not in text
    assert "\r" not in text
