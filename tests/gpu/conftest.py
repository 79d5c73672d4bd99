"""Tests that run kernels on an NVIDIA GPU; without one they are skipped and compile nothing."""

import jax
import pytest


@pytest.fixture(scope="session")
def jax_gpu():
    """Skips a test if JAX has no GPU."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU and a JAX that was built for it")


@pytest.fixture(scope="session")
def torch_gpu():
    """Skips a test if torch has no GPU."""
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a torch that was built for it")
