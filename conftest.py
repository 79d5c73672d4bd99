"""Which files pytest collects beside the tests, and which tests run."""

import functools
import importlib.util
import inspect
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


SHARED = "tests/core/", "tests/kernels/"
"""Folders whose tests two legs share, for they need neither torch nor transformers, except tests that say so."""

CASES = 4
"""Most cases of a list marked `sampled` that a leg runs; the rest runs without `--leg` only."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--leg`."""
    said = "run one of the two parts of the tests that CI shares out to its two releases of JAX; all by default"
    parser.addoption("--leg", type=int, choices=(1, 2), help=said)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked `families` unless `-m` or a test's own id asks for them, and those of the other leg."""
    if "families" not in config.option.markexpr and not any("::" in argument for argument in config.args):
        _leave_out(config, items, [item for item in items if item.get_closest_marker("families")])
    if (leg := config.getoption("leg")) is not None:
        _leave_out(config, items, [item for item, own in _legs(items).items() if own != leg])


def _leave_out(config: pytest.Config, items: list[pytest.Item], left_out: list[pytest.Item]) -> None:
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def _legs(items: list[pytest.Item]) -> dict[pytest.Item, int]:
    """The leg of each test that at most one of them runs; 3 or more for none, as for tests marked `long`.

    Cases of a list take turns. Of lists marked `sampled`, kernels for the most part, no leg runs all: all still run on
    GPUs and compile in `make gate`; all statements of the audit hold in a notebook.
    """
    found: dict[pytest.Item, int] = {item: 3 for item in items if item.get_closest_marker("long")}
    lists = defaultdict(list)
    for item in items:
        path = item.path.relative_to(item.config.rootpath).as_posix()
        shared = isinstance(item, pytest.Function) and path.startswith(SHARED) and item not in found
        if shared and not _needs_more(item):
            lists[path, item.originalname].append(item)
    for (path, name), cases in lists.items():
        first = zlib.crc32(f"{path}::{name}".encode()) % 2
        parts = max(2, -(-len(cases) // CASES)) if cases[0].get_closest_marker("sampled") else 2
        found |= {item: (first + i) % parts + 1 for i, item in enumerate(sorted(cases, key=lambda item: item.nodeid))}
    return found


def _needs_more(item: pytest.Function) -> bool:
    """Whether a test or a fixture of its imports packages that only one leg has."""
    fixtures: dict[str, Any] = item._fixtureinfo.name2fixturedefs
    functions = [item.function, *(definition.func for found in fixtures.values() for definition in found)]
    return any(_asks_for_packages(function) for function in functions)


@functools.cache
def _asks_for_packages(function: Callable[..., Any]) -> bool:
    return "importorskip" in inspect.getsource(function)
