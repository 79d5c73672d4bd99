"""Nearest-neighbour search over packed codes, against exhaustive search over float16 vectors on the same device."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tq_jax import search as nearest
from tq_jax.commands.bench.job import Job, Row, Setting
from tq_jax.commands.bench.timing import num_copies, time_jax
from tq_jax.search.query import TILES
from tq_jax.search.select import keep, narrow

NEIGHBOURS = 10
AGREEMENT = 0.99
"""Least share of neighbours that agree with float32 products of the same codes; equal scores may change places."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of a database and of a call.

    Attributes:
        vectors: Number of vectors in the database.
        dim: Channels per vector.
        queries: Queries per call.
    """

    vectors: int
    dim: int
    queries: int

    @property
    def label(self) -> str:
        """The shape in one line."""
        return f"search {self.vectors} x {self.dim}, {self.queries} queries"

    def as_dict(self) -> Row:
        """The shape as fields of a row."""
        return {"op": "search", "batch": self.queries, "seq": self.vectors, "head_dim": self.dim}


SHAPES = {
    True: (Shape(1 << 20, 200, 1024), Shape(1 << 20, 200, 1), Shape(1 << 20, 1024, 256)),
    False: (Shape(4096, 64, 64),),
}
BITS = (2, 4)


def jobs(setting: Setting) -> Iterator[Job]:
    """Yields one measurement per width, and the exact search."""
    for shape in SHAPES[setting.gpu]:
        for bits in BITS:
            yield Job(f"{shape.label}, mse{bits}", functools.partial(run, shape, bits, setting))
        yield Job(f"{shape.label}, float16", functools.partial(run_exact, shape, setting), peer=True)


@functools.lru_cache(maxsize=1)
def _vectors(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Vectors whose channels differ in variance, as channels of embeddings do, and queries of the same kind."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((shape.dim, shape.dim)))[0] * np.arange(1, shape.dim + 1) ** -0.5
    both = rng.standard_normal((shape.vectors + shape.queries, shape.dim), np.float32) @ basis.T.astype(np.float32)
    return both[: shape.vectors], both[shape.vectors :]


def run(shape: Shape, bits: int, setting: Setting) -> Iterator[Row]:
    """Yields the row of one width."""
    base, queries = _vectors(shape)
    index = nearest.build(base, nearest.IndexSpec(dim=shape.dim, bits=bits))
    nbytes = shape.vectors * index.bytes_per_vector
    asked = nearest.search(index, queries, NEIGHBOURS)[1]
    wanted = nearest.search(index, queries, NEIGHBOURS, precision="float32")[1]
    same = float(jnp.mean(jnp.any(asked[:, :, None] == wanted[:, None], axis=1).astype(jnp.float32)))
    inputs = [(copied, jnp.asarray(queries)) for copied in _copies(index, nbytes)]
    row = _row(shape, setting, lambda i, q: nearest.search(i, q, NEIGHBOURS), inputs, nbytes)
    yield row | {"impl": "tq", "key": f"mse{bits}", "value": "", "error": 1 - same, "ok": same >= AGREEMENT}


def run_exact(shape: Shape, setting: Setting) -> Iterator[Row]:
    """Yields the row of float16 vectors: products with float32 sums, and the best of them, tile by tile."""
    base, queries = _vectors(shape)
    stored = jnp.asarray(base, jnp.float16)
    inputs = [(copied, jnp.asarray(queries, jnp.float16)) for copied in _copies(stored, stored.nbytes)]
    row = _row(shape, setting, _exact, inputs, stored.nbytes)
    yield row | {"impl": "float16", "key": "float16", "value": ""}


@jax.jit
def _exact(base: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
    tile = min(TILES["gpu"], base.shape[0])

    def consider(step: jax.Array, kept: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = lax.dynamic_slice_in_dim(base, step * tile, tile)
        scores = jnp.einsum("qi,ni->qn", queries, rows, preferred_element_type=jnp.float32)
        ids = step * tile + jnp.arange(tile, dtype=jnp.int32)
        scores, ids = narrow(lambda parts: parts[0], (scores, ids[None]), NEIGHBOURS)
        return keep(kept, scores, ids)

    count = queries.shape[0]
    none = jnp.full((count, NEIGHBOURS), -jnp.inf), jnp.full((count, NEIGHBOURS), -1, jnp.int32)
    return lax.fori_loop(0, base.shape[0] // tile, consider, none)


def _copies(tree: nearest.Index | jax.Array, nbytes: int) -> list:
    """Enough copies of the arrays that none is in the GPU's cache when it is read again."""
    return [tree, *(jax.tree.map(jnp.copy, tree) for _ in range(num_copies(nbytes) - 1))]


def _row(shape: Shape, setting: Setting, function: Callable, inputs: list[tuple], nbytes: int) -> Row:
    timing = time_jax(function, inputs)
    floor = setting.floor(timing.us, nbytes, 2 * shape.vectors * shape.dim * shape.queries)
    speed = {"queries_per_second": round(shape.queries / timing.us * 1e6)}
    return shape.as_dict() | timing.as_dict() | floor | speed
