"""Tests that two legs of CI share run in one of them, all others in both."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONTENT = """
import pytest

@pytest.mark.shared
@pytest.mark.parametrize("case", range(14))
def test_cases(case): ...

@pytest.mark.parametrize("case", range(3))
def test_cheap_cases(case): ...

@pytest.mark.slow
def test_slow(): ...

@pytest.mark.slow
def test_of_torch():
    pytest.importorskip("torch")
"""


@pytest.fixture
def collected(tmp_path):
    """Names of the tests that a leg runs, or all of them."""
    (tmp_path / "tests" / "core").mkdir(parents=True)
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "tests" / "core" / "test_some.py").write_text(CONTENT)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  shared\n  slow\n  families\n")

    def collect(*arguments):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return {line.split("::")[1] for line in found.stdout.splitlines() if "::" in line}

    return collect


def test_legs_share_what_takes_long(collected):
    everything, first, second = collected(), collected("--leg", "1"), collected("--leg", "2")
    assert len(everything) == 19
    both = {"test_of_torch", *(f"test_cheap_cases[{case}]" for case in range(3))}
    assert first & second == both
    assert "test_slow" in first ^ second
    lists = [{name for name in leg if name.startswith("test_cases")} for leg in (first, second)]
    assert [len(cases) for cases in lists] == [5, 5]
