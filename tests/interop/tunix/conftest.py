"""Tunix runs as its users run it."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """In place of the fixture for torch, which these tests do not need."""


@pytest.fixture(autouse=True)
def promotion_of_tunix():
    """Tunix promotes dtypes and ranks as JAX does by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
