"""The stored notebooks: run from top to bottom, without errors, small, and the same on every machine."""

import ast
import base64
import importlib.util
import json
import re
import struct
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE = re.compile(r"/(tmp|home|root|work|Users|mnt|opt)/\w|site-packages|\.venv|0x[0-9a-f]{8}")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text("utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(part):
    return part if isinstance(part, str) else "".join(part)


def test_there_are_seven_in_order():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(1, 8)]
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 2_500_000


def test_runs_from_top_to_bottom(notebook):
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert {"display_data", "execute_result"} & set(kinds) and "error" not in kinds
    assert not [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]


def test_is_the_same_on_every_machine(notebook):
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    strings = [text(cell["source"]) for cell in notebook["cells"]]
    for output in (output for cell in code_cells(notebook) for output in cell["outputs"]):
        strings += [text(output.get("text", ""))]
        strings += [text(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
    assert [found.group() for string in strings if (found := MACHINE.search(string))] == []


def test_says_what_it_shows_and_asserts_it(notebook):
    first, last = notebook["cells"][0], notebook["cells"][-1]
    assert first["cell_type"] == "markdown" and text(first["source"]).startswith("# ")
    trees = [ast.parse(text(cell["source"])) for cell in code_cells(notebook)]
    asserts = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert len(asserts) >= 2
    assert any("What to take away" in text(cell["source"]) for cell in notebook["cells"][-3:]), last["cell_type"]


def test_pictures_are_sharp_and_small_and_their_axes_have_names(notebook):
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            if "image/png" not in output.get("data", {}):
                continue
            picture = base64.b64decode(text(output["data"]["image/png"]))
            assert len(picture) < 300_000
            width, height = struct.unpack(">II", picture[16:24])
            assert 800 <= width <= 1700 and height <= 1200
            source = text(cell["source"])
            assert "ylabel" in source and "xlabel" in source


@pytest.fixture
def run():
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(folder, *sources):
    """Writes a notebook of code cells with volatile metadata."""
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {"x": 1}, "source": s, "outputs": [], "execution_count": None}
        for i, s in enumerate(sources)
    ]
    content = {"cells": cells, "metadata": {"kernelspec": {"name": "other"}}, "nbformat": 4, "nbformat_minor": 5}
    path = folder / "01_made.ipynb"
    path.write_text(json.dumps(content))
    return path


def test_running_stores_outputs_and_nothing_of_the_machine(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    path = make(tmp_path, "import sys, os\nprint('a warning', file=sys.stderr)", "print(os.path.basename(os.getcwd()))")
    before = path.read_text()
    assert run.main(["--check"]) == 0
    assert path.read_text() == before
    assert run.main(["01"]) == 0
    stored = json.loads(path.read_text())
    assert [cell["outputs"] for cell in stored["cells"]] == [
        [],
        [{"name": "stdout", "output_type": "stream", "text": [f"{tmp_path.name}\n"]}],
    ]
    assert [cell["metadata"] for cell in stored["cells"]] == [{}, {}]
    assert stored["metadata"] == {"kernelspec": run.KERNEL, "language_info": {"name": "python"}}
    assert "a warning" in capfd.readouterr().err


def test_a_claim_that_does_not_hold_fails_and_stores_nothing(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    path = make(tmp_path, "figure = 1", "assert figure > 2, 'the figure is too small'")
    before = path.read_text()
    assert run.main([]) == 1
    assert path.read_text() == before
    assert "the figure is too small" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="expected the beginnings of names of notebooks"):
        run.main(["09"])
