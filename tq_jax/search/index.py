"""The index, a pytree of codes and of the arrays they share: how it is learned, built and added to."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.format import Code
from pallas_kernels.packing import packed_bytes
from pallas_kernels.pytree import pytree
from tq_jax.plain import whole
from tq_jax.quantizer import is_traced
from tq_jax.search.basis import LearnedBasis, learn
from tq_jax.search.codes import encode, normalized
from tq_jax.search.spec import SCALAR_BYTES, IndexSpec, Widths, widths_bytes

BLOCK = 2048
"""Vectors per call of the compiled encoder, so that one program encodes any number; capacities are multiples of it."""

GROWTH = 1.5
"""Factor by which a full index grows."""


@pytree
class Index:
    """Quantized vectors; a pytree. The id of a vector is its place in the order of adding, and never changes.

    Attributes:
        code: Codes and scales [capacity, ...]; entries from `count` on are not in use.
        offset: float16 [capacity], the second scalar; None unless `spec.has_offset`.
        count: int32, vectors in use.
        basis: The arrays that all vectors share.
        spec: The spec (static).
        widths: Runs of rotated channels of equal bits (static).
    """

    code: Code
    offset: jax.Array | None
    count: jax.Array
    basis: LearnedBasis
    spec: IndexSpec = dataclasses.field(metadata={"static": True})
    widths: Widths = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Vectors that the arrays have room for."""
        return self.code.packed.shape[0]

    @property
    def bytes_per_vector(self) -> int:
        """Stored bytes per vector, scalars included."""
        prod = self.spec.kind == "prod"
        scalars = SCALAR_BYTES * (1 + self.spec.has_offset + prod)
        return widths_bytes(self.widths) + scalars + packed_bytes(self.spec.dim, 1) * prod

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: vectors in use, room for more, and the basis."""
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))


def train(sample: Float[Array | np.ndarray, "n dim"], spec: IndexSpec, *, capacity: int = 0, seed: int = 0) -> Index:
    """Learns the basis that vectors share and returns an index without vectors.

    Args:
        sample: Vectors [n, spec.dim] like those to be added, any float type; at least one.
        spec: What the index stores.
        capacity: Vectors to keep room for, rounded up to a multiple of 2048. Outside jit, `add` makes room as needed.
        seed: Seed of the random rotations, at least 0.

    Returns:
        The empty index.

    Raises:
        ValueError: If the sample is empty, not [n, spec.dim] floats or not finite, if its norms leave float32's range,
            or if seed or capacity is negative or no integer.
    """
    seed, capacity = whole("seed", seed), whole("capacity", capacity)
    host = np.asarray(check_vectors(sample, spec.dim, "sample"), np.float32)
    if len(host) == 0:
        raise ValueError("expected at least one vector to learn from, got none")
    if not np.isfinite(host).all():
        raise ValueError("expected finite vectors, got NaN or infinity")
    if seed < 0 or capacity < 0:
        raise ValueError(f"expected a seed and a capacity of at least 0, got seed={seed}, capacity={capacity}")
    if spec.metric == "cosine":
        host = np.asarray(jax.jit(normalized)(jnp.asarray(host)))
    basis, widths = learn(host, spec, seed=seed)
    room, prod = round_up(max(capacity, 1)), spec.kind == "prod"
    code = Code(
        packed=jnp.zeros((room, widths_bytes(widths)), jnp.uint8),
        scale=jnp.zeros(room, jnp.float16),
        signs=jnp.zeros((room, packed_bytes(spec.dim, 1)), jnp.uint8) if prod else None,
        residual=jnp.zeros(room, jnp.float16) if prod else None,
    )
    offset = jnp.zeros(room, jnp.float16) if spec.has_offset else None
    return Index(code, offset, jnp.zeros((), jnp.int32), basis, spec, widths)


def build(x: Float[Array | np.ndarray, "n dim"], spec: IndexSpec, *, seed: int = 0) -> Index:
    """Learns from vectors and adds them: `add(train(x, spec), x)`.

    Args:
        x: Vectors [n, spec.dim], any float type; at least one.
        spec: What the index stores.
        seed: Seed of the random rotations, at least 0.

    Returns:
        The index; the id of a vector is its place in x.

    Raises:
        ValueError: As `train` and `add` do.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (1000, 64))
        >>> index = build(x, IndexSpec(dim=64, bits=4))
        >>> int(index.count), index.bytes_per_vector
        (1000, 36)
    """
    x = check_vectors(x, spec.dim, "sample")
    return add(train(x, spec, capacity=len(x), seed=seed), x)


def add(index: Index, x: Float[Array | np.ndarray, "n dim"]) -> Index:
    """Returns the index with more vectors; their ids are index.count, index.count + 1, ...

    Args:
        index: The index.
        x: Vectors [n, spec.dim], any float type; lists and torch tensors on the CPU as well.

    Returns:
        The new index. Outside jit it grows as needed. Under jit its capacity is static: if the vectors do not fit, the
        index is returned as it is, with its old count. If jit donates the index, it is written in place.

    Raises:
        ValueError: If x is not [n, spec.dim] floats, or, outside jit, a vector is not finite or so much longer than
            those of the sample that its scalars overflow. Under jit such a vector is stored but never found.
    """
    x = check_vectors(x, index.spec.dim, "vectors")
    if is_traced((index, x)):
        return _write(index, encode(jnp.asarray(x), index.basis, index.spec, index.widths), len(x))
    if len(x) == 0:
        return index
    encoded = _encode_in_blocks(index, x)
    scalars = [s for s in (encoded[0].scale, encoded[0].residual, encoded[1]) if s is not None]
    if not all(np.isfinite(np.asarray(s)).all() for s in scalars):
        raise ValueError(
            "expected finite vectors with scalars below 65504 times those of the vectors learned from; "
            "got NaN, infinity or larger ones"
        )
    needed = int(index.count) + len(x)
    if needed > index.capacity:
        index = _grown(index, round_up(max(needed, int(GROWTH * int(index.count)))))
    return _write(index, encoded, len(x))


def check_vectors(x: Any, dim: int, name: str) -> Any:
    """Returns x as an array of JAX or NumPy, or raises ValueError unless it is [n, dim] floats."""
    if not isinstance(x, np.ndarray | jax.Array):
        try:
            x = np.asarray(x)
        except (TypeError, ValueError, RuntimeError) as error:  # torch raises each of them, for devices and types
            raise ValueError(
                f"expected {name} as an array of JAX or NumPy, or one that NumPy can read, got {type(x).__name__} "
                f"({error})"
            ) from error
    if np.ndim(x) != 2 or x.shape[1] != dim:
        raise ValueError(f"expected {name} of shape [n, {dim}], got {tuple(np.shape(x))}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating point {name}, got dtype {x.dtype}")
    return x


def round_up(count: int) -> int:
    """The least capacity that holds `count` vectors."""
    return -(-count // BLOCK) * BLOCK


_encode = jax.jit(encode, static_argnums=(2, 3))


def _encode_in_blocks(index: Index, x: Any) -> tuple[Code, jax.Array | None]:
    """Encodes vectors by blocks of one shape, so that their codes do not depend on how many are added together."""
    blocks = []
    for start in range(0, len(x), BLOCK):
        block = jnp.asarray(x[start : start + BLOCK], jnp.float32)
        padding = BLOCK - len(block)
        blocks.append(_encode(jnp.pad(block, ((0, padding), (0, 0))), index.basis, index.spec, index.widths))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[: len(x)], *blocks)


def _write(index: Index, encoded: tuple[Code, jax.Array | None], count: int) -> Index:
    """Writes the codes of `count` vectors behind those in use; changes nothing if there is no room."""
    fits = index.count + count <= index.capacity
    stored = (index.code, index.offset)
    if count > index.capacity:
        return index

    def place(array: jax.Array, new: jax.Array) -> jax.Array:
        start = jnp.where(fits, index.count, 0)
        old = lax.dynamic_slice_in_dim(array, start, count)
        return lax.dynamic_update_slice_in_dim(array, jnp.where(fits, new, old), start, axis=0)

    code, offset = jax.tree.map(place, stored, encoded)
    return dataclasses.replace(index, code=code, offset=offset, count=index.count + jnp.where(fits, count, 0))


def _grown(index: Index, capacity: int) -> Index:
    """The index with room for more vectors."""

    def grow(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, capacity - array.shape[0])] + [(0, 0)] * (array.ndim - 1))

    code, offset = jax.tree.map(grow, (index.code, index.offset))
    return dataclasses.replace(index, code=code, offset=offset)
