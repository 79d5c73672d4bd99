"""The version, and the warning about another `interop`."""

import importlib
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

import tq_jax as tq
from tq_jax import _installation

ROOT = Path(tq.__file__).parents[1]


def package(folder, text):
    (folder / "interop").mkdir(parents=True)
    (folder / "interop" / "__init__.py").write_text(text)
    return folder


@pytest.fixture
def interop_on(monkeypatch):
    """Lets Python find `interop` on the given path only."""

    def use(*path):
        for name in [name for name in sys.modules if name.split(".")[0] == "interop"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "path", [str(folder) for folder in path])
        importlib.invalidate_caches()

    return use


def test_version(monkeypatch):
    assert tq.__version__ == _installation.version()
    monkeypatch.setattr(_installation, "DISTRIBUTION", "no such distribution")
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("no such distribution")
    assert _installation.version() == "unknown"


def test_our_interop_is_silent(interop_on, tmp_path):
    later, folder = package(tmp_path / "later", '"""Other."""'), tmp_path / "plain"
    (folder / "interop").mkdir(parents=True)  # without __init__: Python prefers ours
    for path in ((ROOT,), (ROOT, later), (folder, ROOT)):
        interop_on(*path)
        with warnings.catch_warnings(action="error"):
            _installation.warn_if_interop_is_hidden()


def test_no_interop_is_silent(interop_on, tmp_path):
    interop_on(tmp_path)
    with warnings.catch_warnings(action="error"):
        _installation.warn_if_interop_is_hidden()
        interop_on(package(tmp_path / "other", '"""Other."""'))
        _installation.warn_if_interop_is_hidden(tmp_path)  # where ours is not installed


def test_a_module_made_by_hand_is_silent(interop_on, monkeypatch):
    interop_on(ROOT)
    monkeypatch.setitem(sys.modules, "interop", type(sys)("interop"))
    with warnings.catch_warnings(action="error"):
        _installation.warn_if_interop_is_hidden()


@pytest.mark.parametrize("name", ["interop/__init__.py", "interop.py"])
def test_another_interop_that_hides_ours(interop_on, tmp_path, name):
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.write_text('"""Bridges of tq-jax, by their words."""')
    interop_on(tmp_path, ROOT)
    with pytest.warns(RuntimeWarning, match=f"finds {other}, which hides .* in {ROOT / 'interop'}: rename"):
        _installation.warn_if_interop_is_hidden()


def test_another_interop_that_has_overwritten_ours(interop_on, tmp_path):
    interop_on(package(tmp_path, '"""Other."""'))
    with pytest.warns(
        RuntimeWarning,
        match=f"finds {tmp_path}.*, which another package wrote over .*: unins.* --no-deps .` in a checkout",
    ):
        _installation.warn_if_interop_is_hidden(tmp_path)


def test_importing_tq_jax_warns_where_it_is_imported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, tq_jax; print('interop' in sys.modules)")
    path = os.pathsep.join(map(str, (package(tmp_path / "other", '"""Other."""'), ROOT)))
    found = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"
    assert f"{script}:1: RuntimeWarning: `import interop` finds {tmp_path / 'other'}" in found.stderr
