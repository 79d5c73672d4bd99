"""Wrong options of the commands that run a model: one sentence names the mistake, before the work starts."""

import pytest
from refusals import refused

MISTAKES = {
    "demo": [
        ("--bits", "9/4", "expected key/value bits of 1, 2, 2.5, 3, 3.5, 4, 5, 8, got '9/4'"),
        ("--bits", "4/nan", "expected key/value bits of"),
        ("--model", "none.gguf", "no GGUF file at"),
        ("--model", "model.gguf", "expected a complete GGUF file"),
        ("--model", "folder", "no config.json in"),
        ("--model", "config", "config.json"),
        ("--text", "none.txt", "does not exist"),
        ("--text", "folder", "is a directory"),
        ("--text", "latin.txt", "expected a text in UTF-8, got"),
        ("--text", "empty.txt", "which is empty"),
        ("--positions", "63", "64"),
    ],
    "eval": [
        ("--bits", "9/4", "expected key/value bits of"),
        ("--model", "/nowhere/model.gguf", "no GGUF file at /nowhere/model.gguf"),
        ("--texts", "", "expected a file or one of persuasion"),
        ("--texts", "pydoc,pydoc", "expected texts of different names, got pydoc, pydoc"),
        ("--windows", "128,1020", "expected windows that leave something of the prompt of 1024, got '128,1020'"),
        ("--windows", "0.5", "expected comma-separated numbers of at least 0"),
        ("--positions", "0", "--positions"),
        ("--prompt", "-1", "--prompt"),
    ],
    "needle": [
        ("--depths", "2", "expected depths from 0 to 1, ascending, got '2'"),
        ("--depths", "0.5,0.5", "expected depths from 0 to 1, ascending"),
        ("--depths", "0.5,0.1", "expected depths from 0 to 1, ascending"),
        ("--depths", "nan", "expected comma-separated numbers"),
        ("--lengths", "-1", "expected comma-separated numbers of at least 0"),
        ("--lengths", "", "expected comma-separated numbers of at least 0"),
        ("--bits", "9/4", "expected key/value bits of"),
        ("--facts", "0", "--facts"),
        ("--model", "/nowhere/model.gguf", "no GGUF file at /nowhere/model.gguf"),
    ],
}
"""Option, value and part of the message, by command; models and texts are paths from the folder of `files`."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of files that are neither a text nor a model, by name."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    (folder / "model.gguf").write_text("no model")
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text("{}")
    (folder / "folder").mkdir()
    return folder


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [(command, *mistake) for command, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_mistakes_are_found_before_the_work(command, option, value, message, files):
    given = str(files / value) if option in ("--model", "--text") else value
    assert message in refused(command, option, given, "--plot", str(files / "x.png"))
