"""Nearest-neighbour search over quantized vectors: the second application of arXiv 2504.19874.

Example:
    >>> import jax
    >>> from tq_jax import search as nearest
    >>> vectors = jax.random.normal(jax.random.key(0), (500, 64))
    >>> index = nearest.build(vectors, nearest.IndexSpec(dim=64, bits=4))
    >>> scores, ids = nearest.search(index, vectors[:3], k=10)
    >>> scores.shape, ids[:, 0].tolist()
    ((3, 10), [0, 1, 2])
"""

from tq_jax.search.index import Index, add, build, train
from tq_jax.search.query import search
from tq_jax.search.spec import IndexSpec
from tq_jax.search.store import load, save

__all__ = ["Index", "IndexSpec", "add", "build", "load", "save", "search", "train"]
