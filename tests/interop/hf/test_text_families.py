"""Language models of many families: exact inside the window, close at 8 bits beyond it."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import write_families  # noqa: E402
from family_checks import MOST_KL, ask_text, check, compress, is_known, make_text  # noqa: E402
from text_families import DENSE_FAMILIES, TEXT_FAMILIES  # noqa: E402

from interop.hf.layer import VERSION  # noqa: E402

ALWAYS = (
    "cohere2", "ernie4_5_moe", "falcon_h1", "gemma2", "gemma3n_text", "gemma4_text", "glm4", "gpt2", "gpt_neox",
    "gpt_oss", "granitemoehybrid", "lfm2", "llama", "llama4_text", "mistral", "mixtral", "nemotron_h", "olmo2", "opt",
    "phi3", "qwen2", "qwen3", "qwen3_5_text", "smollm3", "stablelm", "bloom", "doge", "falcon",
)  # fmt: skip
"""A third of the families: those that people run most, and one of each kind of layer."""


def cases():
    for name in (*TEXT_FAMILIES, *DENSE_FAMILIES):
        yield pytest.param(name, marks=() if name in ALWAYS else pytest.mark.families)


@pytest.mark.parametrize("name", list(cases()))
def test_a_family(name):
    if not is_known(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = make_text(name)
    if VERSION < (5, 0):
        try:
            compress(model, dense=name in DENSE_FAMILIES)
        except NotImplementedError as refused:
            pytest.skip(str(refused))
    found = check(model, ask_text(), dense=name in DENSE_FAMILIES)
    assert found.is_exact and found.compressed and 0 < found.kl < MOST_KL, found


def rows(page):
    """The table of each section, without its numbers."""
    found = {}
    for section, text in (part.split("\n", 1) for part in page.split("\n## ")[1:]):
        lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
        found[section] = [(name, model, layers, same.split(",")[0]) for name, model, layers, same, _ in lines]
    return found


def test_the_page_names_every_family():
    page = rows(write_families.TARGET.read_text("utf-8"))
    named = [(section, name) for section, lines in page.items() for name, *_ in lines]
    assert named == [(section, name) for section, name, *_ in write_families.families()]
    assert {same for lines in page.values() for *_, same in lines} == {"yes"}


def test_the_page_is_what_its_script_writes(capsys, monkeypatch):
    """Two families anew: what the page says of them, and an exit status that tells."""
    monkeypatch.setattr("sys.argv", ["write_families.py", "-o", "-", "--only", "llama,llava"])
    assert write_families.main() == 0
    page = rows(write_families.TARGET.read_text("utf-8"))
    for section, lines in rows(capsys.readouterr().out).items():
        assert lines and set(lines) <= set(page[section])
    monkeypatch.setattr(write_families, "MOST_KL", 0)
    monkeypatch.setattr("sys.argv", ["write_families.py", "-o", "-", "--only", "llama"])
    assert write_families.main() == 1 and "not as they should be: llama" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["write_families.py", "--only", "lama"])
    with pytest.raises(SystemExit):
        write_families.main()
    assert "got ['lama']" in capsys.readouterr().err
