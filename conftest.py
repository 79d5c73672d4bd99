"""What pytest collects beside the tests."""

import importlib.util
from pathlib import Path

OPTIONAL = {
    **{f"interop/vllm/{name}.py": "vllm" for name in ("backend", "impl", "platform", "report")},
    "interop": "torch",
    "tests/fake_quant_hf.py": "transformers",
}
"""Where modules need a framework that may be missing, the first that fits; the tests that use them skip by name."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out the doctests of modules that cannot be imported."""
    for path, framework in OPTIONAL.items():
        if collection_path.is_relative_to(Path(__file__).parent / path):
            return True if importlib.util.find_spec(framework) is None else None
    return None
