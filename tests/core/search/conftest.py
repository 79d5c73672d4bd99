import numpy as np
import pytest
from vectors import DIM


@pytest.fixture(scope="module")
def data():
    """Clustered vectors with a common mean and unequal variances, and queries like them."""
    rng = np.random.default_rng(0)
    spread = np.geomspace(2, 0.2, DIM)
    centres = rng.normal(size=(40, DIM)) * spread + 0.5
    x = centres[rng.integers(40, size=3000)] + 0.4 * rng.normal(size=(3000, DIM)) * spread
    queries = centres[rng.integers(40, size=200)] + 0.4 * rng.normal(size=(200, DIM)) * spread
    return x.astype(np.float32), queries.astype(np.float32)
