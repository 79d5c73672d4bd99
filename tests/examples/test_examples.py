"""Every script in `examples/` runs as a user runs it; that of vLLM is in tests/interop/vllm."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tq_jax.data import persuasion

FOLDER = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    """The standard output of a script."""
    path = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / name, *map(str, arguments)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def test_every_script_has_a_test_and_says_how_it_is_run():
    tests = Path(__file__).read_text("utf-8") + (FOLDER.parent / "tests/interop/vllm/test_example.py").read_text(
        "utf-8"
    )
    scripts = sorted(FOLDER.glob("*.py"))
    assert [path.name for path in scripts if f'"{path.name}"' not in tests] == []
    texts = {path.name: path.read_text("utf-8") for path in scripts}
    assert [name for name, text in texts.items() if f"    python examples/{name}" not in text] == []


@pytest.mark.slow
def test_flax_loop_recites_from_both_caches():
    said = run("flax_loop.py")
    learnt = " ".join(persuasion().split())[:240]
    assert said.count(learnt) == 2
    full, compressed = (int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes in all", said))
    assert compressed < full / 2


@pytest.mark.slow
def test_hf_chat_reads_the_document_once(tmp_path):
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    from vllm_engines import make_model

    document = tmp_path / "document.txt"
    document.write_text(" ".join(f"w{30 + i % 70}" for i in range(200)))
    said = run("hf_chat.py", make_model(tmp_path / "model", 2), document, "w5 w6", "w9", "--new-tokens", 4, "--bits", 3)
    assert "(204 of 204 tokens read" in said and "(2 of 203 tokens read" in said
    assert len(re.findall(r"^(?:w\d+ ?){4}$", said, re.MULTILINE)) == 2
    assert "compresses 2 of 2 layers [0, 1] to K3/V3" in said


def test_a_word_of_several_tokens_is_refused():
    with pytest.raises(SystemExit, match="is one token of the model, got 'Kellynch' of 3 tokens"):
        runpy.run_path(str(FOLDER / "nearest_neighbours.py"))["only_token"]("Kellynch", [5, 6, 7])


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the extra `models`")
def test_nearest_neighbours_of_a_word():
    found, true = re.findall(r"(?:found|true): +(.*)", run("nearest_neighbours.py", "Monday"))
    assert re.sub(r" [\d.]+", "", found) == true
    assert set(true.split(", ")) == {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"}


def test_nearest_neighbours_of_given_vectors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(300, 32))
    vectors[7] = vectors[3] + 0.01
    np.save(tmp_path / "vectors.npy", vectors)
    said = run("nearest_neighbours.py", "--vectors", tmp_path / "vectors.npy", 3, "--neighbours", 2)
    assert "300 vectors of 32 numbers" in said
    assert set(re.findall(r"(\d+) 1\.00", said)) == {"3", "7"} and "true:  3, 7" in said
