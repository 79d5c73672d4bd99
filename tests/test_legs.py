"""Tests that two legs of CI share run in one of them, all others in both."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONTENT = """
import pytest

@pytest.mark.sampled
@pytest.mark.parametrize("case", range(14))
def test_long_list(case): ...

@pytest.mark.parametrize("case", range(5))
def test_cases(case): ...

def test_alone(): ...

@pytest.mark.long
def test_long(): ...

def test_of_torch():
    pytest.importorskip("torch")
"""


@pytest.fixture
def collected(tmp_path):
    """Names of the tests that a leg runs, or all of them."""
    for folder in "core", "interop":
        (tmp_path / "tests" / folder).mkdir(parents=True)
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "tests" / "core" / "test_some.py").write_text(CONTENT)
    (tmp_path / "tests" / "interop" / "test_other.py").write_text("def test_of_interop(): ...")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  sampled\n  families\n  long\n")

    def collect(*arguments):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return {line.split("::")[1] for line in found.stdout.splitlines() if "::" in line}

    return collect


def test_legs_share_tests_that_need_jax_alone(collected):
    everything, first, second = collected(), collected("--leg", "1"), collected("--leg", "2")
    assert len(everything) == 23
    assert first & second == {"test_of_torch", "test_of_interop"}
    assert "test_alone" in first ^ second
    assert "test_long" not in first | second
    cases, long_lists = (
        [len([name for name in leg if name.startswith(f"test_{kind}[")]) for leg in (first, second)]
        for kind in ("cases", "long_list")
    )
    assert sorted(cases) == [2, 3]
    assert all(count <= 4 for count in long_lists) and sum(long_lists) >= 7
