"""Nearest-neighbour search over quantized vectors: the second application of arXiv 2504.19874.

index = search.build(vectors, search.IndexSpec(dim=200, bits=4))
scores, ids = search.search(index, queries, k=10)
"""

from tq_jax.search.index import Index, add, build, train
from tq_jax.search.query import search
from tq_jax.search.spec import IndexSpec
from tq_jax.search.store import load, save

__all__ = ["Index", "IndexSpec", "add", "build", "load", "save", "search", "train"]
