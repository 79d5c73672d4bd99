"""Exhaustive search: one tile of codes after the other is decoded and multiplied, and only the best k are kept."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from pallas_kernels.packing import unpack
from tq_jax.gradients import forward_only
from tq_jax.plain import whole
from tq_jax.quantizer import is_traced, sketch_gain
from tq_jax.search.basis import power_of_two_over
from tq_jax.search.codes import decode_integers, normalized, offset_unit
from tq_jax.search.index import Index, check_vectors
from tq_jax.search.select import keep, narrow

Precision = Literal["float32", "float16"]
QUERIES = 1024
"""Most queries that share a decoded tile; if there are more, they run in batches."""

TILES = {"cpu": 16_384, "gpu": 65_536}
"""Vectors per tile, by platform."""

_Operand = tuple[Array, Array]
"""Queries [q, dim] as operands of products, and the factors [q, 1] of these products."""


def search(
    index: Index,
    queries: Float[Array | np.ndarray, "q dim"],
    k: int,
    *,
    precision: Precision | None = None,
    tile: int | None = None,
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Finds the k best vectors for each query: exhaustively, on codes, one decoded tile at a time.

    Args:
        index: The index.
        queries: Queries [q, spec.dim], any float type and number; lists and torch tensors on the CPU as well.
        k: Neighbours per query; static.
        precision: Type of the operands of products: "float32", or "float16" with float32 sums, where codes are exact
            and queries are rounded to 11 bits. None means float32 on CPUs and float16 elsewhere.
        tile: Vectors per tile; None takes the best number for the platform.

    Returns:
        Estimated scores, descending, and ids. Equal scores are in the order of ids. Scores are ones that the metric can
        have: at most 0 for "l2", from -1 to 1 for "cosine", and float32's largest number for larger ones. If there are
        fewer than k vectors, the last scores are -inf and their ids -1.

    Raises:
        ValueError: If queries are not [q, spec.dim] floats or, outside jit, not finite; or if k or tile is no integer
            or below 1. Under jit a query that is not finite gets ids of -1.
        NotImplementedError: For a gradient through the scores, which only have derivatives along a direction.

    Example:
        >>> from tq_jax import search as nearest
        >>> x = jax.random.normal(jax.random.key(0), (500, 64))
        >>> index = nearest.build(x, nearest.IndexSpec(dim=64, bits=4, metric="l2"))
        >>> nearest.search(index, x[:3], k=1)[1].tolist()
        [[0], [1], [2]]
    """
    queries = check_vectors(queries, index.spec.dim, "queries")
    k, tile = whole("k", k), None if tile is None else whole("tile", tile)
    if k < 1 or (tile is not None and tile < 1):
        raise ValueError(f"expected k and tile of at least 1, got k={k}, tile={tile}")
    if precision not in (None, *get_args(Precision)):
        raise ValueError(f"expected precision in {get_args(Precision)}, got {precision!r}")
    if not is_traced(queries) and not np.all(np.abs(np.asarray(queries)) <= np.finfo(np.float32).max):
        raise ValueError("expected queries that are finite in float32, got NaN, infinity or larger numbers")
    platform = jax.default_backend()
    precision = precision or ("float32" if platform == "cpu" else "float16")
    tile = min(tile or TILES.get(platform, TILES["gpu"]), index.capacity)
    return _search(index, jnp.asarray(queries, jnp.float32), k, precision, tile)


@functools.partial(jax.jit, static_argnames=("k", "precision", "tile"))
def _search(index: Index, queries: Array, k: int, precision: Precision, tile: int) -> tuple[Array, Array]:
    count = queries.shape[0]
    if count == 0:
        return jnp.zeros((0, k), jnp.float32), jnp.zeros((0, k), jnp.int32)
    if count <= QUERIES:
        return _search_batch(index, queries, k, precision, tile)
    batches = -(-count // QUERIES)
    padded = jnp.pad(queries, ((0, batches * QUERIES - count), (0, 0))).reshape(batches, QUERIES, -1)
    found = lax.map(lambda batch: _search_batch(index, batch, k, precision, tile), padded)
    scores, ids = (part.reshape(batches * QUERIES, k)[:count] for part in found)
    return scores, ids


def _search_batch(index: Index, queries: Array, k: int, precision: Precision, tile: int) -> tuple[Array, Array]:
    basis, spec = index.basis, index.spec
    rotated, offset_weight, finish = _prepare(index, queries)
    operands = [_operand(rotated * basis.gain[None], precision)]
    if basis.sketch is not None:
        sketched = jnp.einsum("qi,ji->qj", rotated, basis.sketch, precision="highest") * sketch_gain(spec.dim)
        operands.append(_operand(sketched, precision))

    def score(terms: _Terms) -> Array:
        scores, *more = (
            product * size * scale
            for product, (_, size), scale in zip(terms.products, operands, terms.scales, strict=True)
        )
        # After a select, compilers do not fuse a product into a sum, whose rounding would depend on the tile.
        scores = jnp.where(scores == 0, 0.0, scores)
        scores = sum(more, start=scores)
        if terms.offset is not None:
            scores += offset_weight[:, None] * terms.offset
        return jnp.where((terms.ids >= 0) & ~jnp.isnan(scores), scores, -jnp.inf)

    def consider(step: Array, kept: tuple[Array, Array]) -> tuple[Array, Array]:
        terms = narrow(score, _terms(index, operands, step, precision, tile), k)
        return keep(kept, score(terms), terms.ids)

    none = (
        jnp.full((queries.shape[0], k), value, dtype) for value, dtype in ((-jnp.inf, jnp.float32), (-1, jnp.int32))
    )
    scores, ids = lax.fori_loop(0, (index.count + tile - 1) // tile, consider, tuple(none))
    found = jnp.isfinite(scores)
    return forward_only(jnp.where(found, finish(scores), -jnp.inf), "search"), jnp.where(found, ids, -1)


class _Terms(NamedTuple):
    """Terms of the scores of a tile: products [q, n]; scales, offset and ids [1, n], shared by all queries."""

    products: list[Array]
    scales: list[Array]
    offset: Array | None
    ids: Array


def _terms(index: Index, operands: list[_Operand], step: Array, precision: Precision, tile: int) -> _Terms:
    """The terms of a tile; the id is -1 for a vector that does not count."""
    start = jnp.minimum(step * tile, index.capacity - tile)
    code, offset = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, tile), (index.code, index.offset))
    scale = code.scale.astype(jnp.float32)
    # Centroids are half-integers below 128.5, exact in float16.
    integers = decode_integers(_transposed(code.packed), index.spec, index.widths, axis=-2)
    factors, scales = [integers.astype(precision) + np.asarray(0.5, precision)], [scale]
    if code.signs is not None and code.residual is not None:
        signs = unpack(_transposed(code.signs), 1, index.spec.dim, axis=-2)
        factors.append(1 - 2 * signs.astype(precision))
        scales.append(code.residual.astype(jnp.float32))
    ids = start + jnp.arange(tile, dtype=jnp.int32)
    # The last tile starts early enough to fit; the vectors that it shares with the tile before do not count again.
    fresh = (ids >= step * tile) & (ids < index.count) & jnp.isfinite(scale)
    return _Terms(
        [_product(queries, factor, precision) for (queries, _), factor in zip(operands, factors, strict=True)],
        [scale[None] for scale in scales],
        None if offset is None else offset.astype(jnp.float32)[None],
        jnp.where(fresh, ids, -1)[None],
    )


def _prepare(index: Index, queries: Array) -> tuple[Array, Array, Callable[[Array], Array]]:
    """Rotated queries [q, dim], the weight of the second scalar [q], and what makes scores [q, k] of sums of terms.

    Sums are those of vectors and queries times powers of two, so that squares are in float32's range.
    """
    basis, spec = index.basis, index.spec
    if spec.metric == "cosine":
        queries = normalized(queries)
    factor, basis = basis.in_range()
    own = power_of_two_over(jnp.max(jnp.abs(queries), axis=-1))
    if spec.metric == "l2":
        # -|q - x|^2 = 2 <q - m, x - m> - |x - m|^2 - |q - m|^2; half of the first two terms is summed, then doubled.
        own = jnp.minimum(own, factor)
        share = own / factor
        queries = queries * own[:, None] - basis.mean[None] * share[:, None]
        weight, constant = 0.5 * share, -jnp.sum(queries * queries, axis=-1)
    else:
        # <q, x> = <q - t m, x - m> + t <m, x - m> + <q, m> for any t. Codes are best along x - m itself, so t is the
        # mean's share of the query, if the query is like the vectors: 1 for a query of their length.
        queries = queries * own[:, None]
        typical = jnp.sqrt(basis.unit**2 + jnp.sum(basis.mean * basis.mean))
        weight = jnp.sqrt(jnp.sum(queries * queries, axis=-1)) / typical
        constant = jnp.sum(queries * basis.mean[None], axis=-1)
        queries = queries - weight[:, None] * basis.mean[None]

    def finish(sums: Array) -> Array:
        of_query, of_vectors = own[:, None], factor
        if spec.metric == "l2":
            # The two stored scalars are rounded apart, so that the distance of equal vectors could be below 0.
            sums, of_vectors = jnp.minimum(sums * 2.0 * share[:, None] + constant[:, None], 0.0), own[:, None]
        else:
            sums = sums + constant[:, None]
        most = 1.0 if spec.metric == "cosine" else jnp.finfo(jnp.float32).max
        return jnp.clip(sums / of_query / of_vectors, -most, most)

    rotated = jnp.einsum("qi,ij->qj", queries, basis.rotation, precision="highest") * basis.unit
    return rotated, weight * offset_unit(basis, spec), finish


def _operand(queries: Array, precision: Precision) -> _Operand:
    """Queries in the type of the products, scaled for float16."""
    if precision == "float32":
        return queries, jnp.ones_like(queries[:, :1])
    # Queries are scaled to at most 1 first: float16 has few bits for small numbers and ends at 65504.
    largest = jnp.maximum(jnp.max(jnp.abs(queries), axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (queries / largest).astype(jnp.float16), largest


def _transposed(packed: Array) -> Array:
    """Bytes [bytes, n], in memory too: runs of channels are then rows, which decode without a branch per element."""
    # Otherwise compilers transpose while they decode, one byte of many vectors at a time, or transpose the whole index.
    packed = with_layout_constraint(packed, Layout((0, 1)))
    return lax.optimization_barrier(with_layout_constraint(packed.T, Layout((0, 1))))


def _product(queries: Array, tile: Array, precision: Precision) -> Array:
    """Inner products [q, n], float32."""
    highest = "highest" if precision == "float32" else None
    return jnp.einsum("qi,in->qn", queries, tile, precision=highest, preferred_element_type=jnp.float32)
