import importlib
import json
import os
import runpy
import subprocess
import sys
import zipfile

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from tq_jax.commands.download import unpack_wheel
from tq_jax.commands.tasks import reasoning as gym
from tq_jax.commands.tasks import ruler as official
from tq_jax.commands.tasks.reasoning import final_answer, reasoning
from tq_jax.commands.tasks.ruler import RULER, make_item, ruler
from tq_jax.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """A token per word."""
    backend = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, None, {})


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that replaces all registries; the cache is empty."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TQ_JAX_CACHE", str(tmp_path / "cache"))
    gym_process_ended()
    return folder


def make_wheel(folder, package):
    name, version = package.replace("-", "_").split("==")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def gym_process_ended():
    """Ends the process that an earlier test may have started."""
    if gym._start.cache_info().currsize:
        gym._start().close()


def unpacked(package, digest):
    return unpack_wheel(package, sha256=digest, folder="tasks")


def script_output(subset, tokenizer, folder, **arguments):
    """What RULER's script writes for itself: with only its tokenizer and what is not installed replaced."""
    packages = unpacked(official.PACKAGE, official.SHA256), unpacked(official.WORDS, official.WORDS_SHA256)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    modules = {
        "tokenizer.py": "import tokenizers\n"
        "class Words:\n"
        "    def __init__(self, path): self.backend = tokenizers.Tokenizer.from_file(path)\n"
        "    def text_to_tokens(self, text): return self.backend.encode(text).tokens\n"
        "select_tokenizer = lambda kind, path: Words(path)\n",
        "tqdm.py": "tqdm = lambda items: items\n",
    }
    for name, text in modules.items():
        (folder / name).write_text(text)
    tasks = runpy.run_path(str(packages[0] / "long_context_eval/data/synthetic/constants.py"))["TASKS"]
    script = packages[0] / "long_context_eval/data/synthetic" / f"{subset}.py"
    options = dict(arguments, save_dir=folder, save_name="x", tokenizer_path=folder / "tokenizer.json")
    options["tokens_to_generate"] = tasks[subset]["tokens_to_generate"]
    options["template"] = tasks[subset]["template"] + tasks[subset]["answer_prefix"]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    path = os.pathsep.join([str(folder), str(script.parent), *map(str, packages)])
    subprocess.run(
        [sys.executable, "-P", script, *words],
        check=True,
        env=dict(os.environ, PYTHONPATH=path),
        stdout=subprocess.DEVNULL,
    )
    return [json.loads(line) for line in (folder / "x/validation.jsonl").read_text().splitlines()]


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize(
    "subset", [pytest.param(name, marks=pytest.mark.long) if name.startswith("niah") else name for name in RULER]
)
def test_ruler_asks_for_what_its_texts_hold(subset, tokenizer, monkeypatch):
    expected = {}

    def record(name, prompt, begins, answers, *, one):
        expected[name] = answers
        assert one == subset.startswith("qa_")
        return make_item(name, prompt, begins, answers, one=one)

    monkeypatch.setattr(official, "make_item", record)
    items = ruler(subset, tokenizer=tokenizer, length=1536, count=2)
    assert [item.name for item in items] == [f"{subset}-0000", f"{subset}-0001"]
    assert items[0].prompt != items[1].prompt
    for item in items:
        answers = expected[item.name]
        held = [answer in item.prompt for answer in answers]
        assert all(held) or answers in (["yes"], ["no"]), answers
        assert item.grade(" ".join(answers)) == 1
        assert item.grade(" ".join(answers).upper()) == 1
        assert item.grade("") == 0
        assert item.grade(item.begins) == 0
        used = len(tokenizer.encode(item.prompt + item.begins)) + RULER[subset]
        assert 800 < used <= 1536 + (RULER[subset] if subset == "fwe" else 0)
        assert not item.prompt[-1].isspace()
        assert item.begins[0] == " "


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize(
    ("subset", "script", "special"),
    [
        ("vt", "variable_tracking", {"num_chains": 1, "num_hops": 4}),
        ("cwe", "common_words_extraction", {"freq_cw": 30, "freq_ucw": 3, "num_cw": 10}),
        ("fwe", "freq_words_extraction", {"alpha": 2.0}),
        ("qa_1", "qa", {"dataset": "squad"}),
    ],
)
def test_ruler_texts_are_those_of_the_scripts(subset, script, special, tokenizer, tmp_path):
    limits = {"max_seq_length": 1536, "num_samples": 2, "random_seed": 7}
    rows = script_output(script, tokenizer, tmp_path, **limits, **special)
    items = ruler(subset, tokenizer=tokenizer, length=1536, count=2, seed=7)
    assert [item.prompt + item.begins for item in items] == [row["input"] for row in rows]
    assert [item.grade(" ".join(row["outputs"])) for item, row in zip(items, rows, strict=True)] == [1, 1]


@pytest.mark.weights
@pytest.mark.slow
def test_seeds_of_ruler(tokenizer):
    texts = [[i.prompt for i in ruler("vt", tokenizer=tokenizer, length=1024, count=2, seed=s)] for s in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    root = unpacked(official.PACKAGE, official.SHA256) / "long_context_eval"
    yaml = importlib.import_module("yaml")
    subsets = yaml.safe_load((root / "synthetic.yaml").read_text())
    tasks = runpy.run_path(str(root / "data/synthetic/constants.py"))["TASKS"]
    assert {name: tasks[subsets[name]["task"]]["tokens_to_generate"] for name in RULER} == RULER
    essays = {name for name, config in subsets.items() if config["args"].get("type_haystack") == "essay"}
    assert set(official.ESSAYS) == essays == set(subsets) - set(RULER)


@pytest.mark.weights
@pytest.mark.slow
def test_lengths_that_hold_no_question_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(official, "PATIENCE", 0.5)
    for subset in ("cwe", "qa_1"):
        with pytest.raises(ValueError, match=r"128 tokens: .*the length may be too small.*0 questions made, and then"):
            ruler(subset, tokenizer=tokenizer, length=128, count=2)
    with pytest.raises(ValueError, match=r"ruler fwe: 2 questions of 20 tokens: .*IndexError"):
        ruler("fwe", tokenizer=tokenizer, length=20, count=2)
    monkeypatch.setattr(official, "TIMEOUT", 0.1)
    monkeypatch.setattr(official, "TIMEOUT_EACH", 0.0)
    with pytest.raises(ValueError, match=r"expected them within 0.1 s, got none \(the length may be too small"):
        ruler("vt", tokenizer=tokenizer, length=1024, count=2)


def test_subsets_and_numbers_are_checked_before_the_download(wheels, tokenizer):
    options = dict(tokenizer=tokenizer, length=1024, count=2)
    for subset in official.ESSAYS:
        with pytest.raises(NotImplementedError, match=f"without essays .niah_single_1, .*qa_2.*, got '{subset}'"):
            ruler(subset, **options)
    with pytest.raises(ValueError, match="expected a subset among niah_single_1, .*qa_2, got 'qa_3'"):
        ruler("qa_3", **options)
    with pytest.raises(ValueError, match="expected a positive length and count, got 1024 and 0"):
        ruler("vt", **options | {"count": 0})
    with pytest.raises(ValueError, match=r"expected a seed from 0 to 2\*\*32 - 1, got -1"):
        ruler("vt", **options, seed=-1)
    with pytest.raises(ValueError, match="expected a positive count, got 0"):
        reasoning("chain_sum", count=0)


def test_packages_are_downloaded_and_checked(wheels, tokenizer, tmp_path):
    with pytest.raises(ConnectionError, match=f"pip download {official.PACKAGE} failed: no network, or no package"):
        ruler("vt", tokenizer=tokenizer, length=1024, count=2)
    with pytest.raises(ConnectionError, match=f"pip download {gym.PACKAGE} failed: no network, or no package"):
        reasoning("chain_sum", count=2)
    make_wheel(wheels, official.PACKAGE)
    make_wheel(wheels, gym.PACKAGE)
    with pytest.raises(ValueError, match=f"expected sha256 {official.SHA256}, got"):
        ruler("vt", tokenizer=tokenizer, length=1024, count=2)
    with pytest.raises(ValueError, match=f"expected sha256 {gym.SHA256}, got"):
        reasoning("chain_sum", count=2)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_rules_of_ruler():
    every = make_item("x", "?", "", ["Ab", "c d", "1"], one=False)
    assert every.grade("aB; C D") == pytest.approx(2 / 3)
    assert every.grade("c\td") == 0
    some = make_item("x", "?", "", ["Ab", "c d"], one=True)
    assert (some.grade("C D"), some.grade("c-d")) == (1, 0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Answer: 1\nNo.\nAnswer: 2", "2"),
        ("First\n\n 7 \n\n", "7"),
        ("", ""),
        ("Answer:", ""),
        ("Answer:\n1 2\n3 4\n", "1 2\n3 4"),
        ("**Answer:** x**", "x**"),
        ("so **Answer: 12**", "12"),
    ],
)
def test_final_answers(answer, expected):
    assert final_answer(answer) == expected


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.long
def test_verifiers_grade_answers(monkeypatch):
    gym_process_ended()
    for dataset in ("chain_sum", "leg_counting"):
        items = reasoning(dataset, count=3)
        assert [item.name for item in items] == [f"{dataset}-000{i}" for i in range(3)]
        assert all(item.prompt.endswith("\n\n" + gym.REQUEST) for item in items)
        assert [item.prompt for item in reasoning(dataset, count=3)] == [item.prompt for item in items]
        assert [item.prompt for item in reasoning(dataset, count=3, seed=1)] != [item.prompt for item in items]
        right = [i for i in range(-20, 500) if items[0].grade(f"It is 1.\nAnswer: {i}") == 1]
        assert len(right) == 1
        assert items[0].grade(str(right[0])) == 1
        assert items[0].grade(f"It is about {right[0]} or so.") < 1
        assert items[0].grade("") == 0
    first = reasoning("chain_sum", count=1)[0]
    expression = first.prompt.partition("problem: ")[2].partition(" =")[0]
    assert first.grade(f"Answer: {eval(expression)}") == 1
    gym._start().process.kill()
    with pytest.raises(RuntimeError, match="expected a reply, got the end of the process"):
        first.grade("Answer: 1")
    monkeypatch.setattr(gym, "TIMEOUT_GRADE", 0.0)
    assert first.grade(f"Answer: {eval(expression)}") == 0
    monkeypatch.undo()
    assert first.grade(f"Answer: {eval(expression)}") == 1
    with pytest.raises(ValueError, match="expected one of 106 data sets .*sudoku.*, got 'no_such'"):
        reasoning("no_such", count=2)
    with pytest.raises(ValueError, match="expected 2 questions of 'composite', got AssertionError"):
        reasoning("composite", count=2)
    gym_process_ended()
