"""Which files pytest collects beside the tests."""

import importlib.util
from pathlib import Path

import pytest

USERS_OF_VLLM = "backend", "bias_statistics", "metadata", "platform", "prompts", "report"
NEVER = tuple(f"interop/vllm/{name}.py" for name in USERS_OF_VLLM)
"""Modules without doctests that import vLLM, which warns of what it deprecates itself."""

BY_A_TEST = "interop/tunix/"
"""Modules that import Tunix, which warns of what it deprecates; a test that imports it silently runs their doctests."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out helpers of tests, which have no examples, and modules that cannot be imported."""
    if collection_path.suffix != ".py":
        return None
    path = collection_path.relative_to(Path(__file__).parent)
    helper = path.parts[0] == "tests" and not path.name.startswith(("test_", "conftest"))
    without_torch = path.parts[0] == "interop" and importlib.util.find_spec("torch") is None
    left_out = path.as_posix() in NEVER or path.as_posix().startswith(BY_A_TEST)
    return True if helper or without_torch or left_out else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked `families` unless `-m` or a test's own id asks for them."""
    if "families" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("families")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
