"""What pytest collects beside the tests."""

import importlib.util
from pathlib import Path

OPTIONAL = {"interop": "torch", "tests/interpreted.py": "torch", "tests/fake_quant_hf.py": "transformers"}
"""Where modules need a framework that may be missing; the tests that use them skip by name."""

NEVER = tuple(f"interop/vllm/{name}.py" for name in ("backend", "biased", "impl", "platform", "report"))
"""Modules without doctests that import vLLM, which warns of what it deprecates itself."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out the doctests of modules that cannot be imported."""
    root = Path(__file__).parent
    if any(collection_path == root / path for path in NEVER):
        return True
    for path, framework in OPTIONAL.items():
        if collection_path.is_relative_to(root / path):
            return True if importlib.util.find_spec(framework) is None else None
    return None
