"""Strict JAX, four host devices, and shape annotations checked while tests run."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import jax
import jaxtyping
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share a GPU, and torch is beside JAX
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 50, 100)  # tracing makes many small objects that live on: some 5 % of the time

PACKAGES = ("tq_jax", "pallas_kernels")


def _annotated(package: str) -> bool:
    """Whether a module of the package names jaxtyping."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    return any("jaxtyping" in path.read_text() for path in Path(spec.origin).parent.rglob("*.py"))


def _check_shapes() -> None:
    """Checks annotated shapes at each call, in tests only, so that users pay nothing for them.

    Without beartype, which a GPU machine need not have, nothing is checked.
    """
    if importlib.util.find_spec("beartype") is None:
        return
    annotated = [package for package in PACKAGES if _annotated(package)]
    if not annotated:
        return
    early = [name for name in sys.modules if name.split(".")[0] in annotated]
    if early:
        raise RuntimeError(f"imported before shape checking was installed: {early}")
    from jaxtyping import install_import_hook

    install_import_hook(annotated, "shape_checker.check")


_check_shapes()


@pytest.fixture(autouse=True, scope="module")
def compiled_for_one_module():
    """Forgets what a module compiled: all modules together would take more memory than a small machine has."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked_shapes():
    """Lets a wrong shape reach the error that a user would meet."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
