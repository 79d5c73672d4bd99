"""Rotation of a tile of vectors by tensor cores, exact to float32 rounding.

Each row is scaled by a power of two and cut into a high and a low fp16 plane, and so is the matrix unless its entries
are signs; bfloat16 vectors that are not centred are multiplied as they are. The Walsh-Hadamard matrix of n x 16
channels is that of n times that of 16: products with the latter, then sums and differences of tiles.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.encode.loads_triton import Place, load, mask_channels, padded_size
from pallas_kernels.encode.plan import Inputs, Plan
from pallas_kernels.tiles.intrinsics_triton import perform

TOP_EXPONENT = 12
"""Binary exponent of the largest channel, or of the norm, of a row that is cut into fp16 planes."""

MATRIX_GAIN = 1024.0
"""Factor of the fp16 planes of a matrix, which keeps its low plane normal."""

WIDTH = 16
"""Channels of a tile of `hadamard_tiles`."""


def vectors(x: Inputs, at: Place, plan: Plan) -> tuple[list[list[jax.Array]], jax.Array]:
    """Planes of each chunk of channels, and the factor that undoes the scaling of rows and matrix."""
    one = jnp.ones((plan.tile,), jnp.float32)
    if not x.matrices:
        return [], one
    padded = x.matrices[0][0].shape[0]
    chunks = [load(x, at, start, plan.chunk, plan) for start in range(0, padded, plan.chunk)]
    if not plan.planes:
        return [[chunk] for chunk in chunks], one * plan.factor
    up, down = row_scale([jnp.max(jnp.abs(chunk), axis=1) for chunk in chunks])
    return [cut(chunk * up[:, None], plan.planes) for chunk in chunks], down * plan.factor


def row_scale(largest: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The power of two that brings the largest magnitude of a row to 2**TOP_EXPONENT, and its inverse."""
    top = largest[0]
    for other in largest[1:]:
        top = jnp.maximum(top, other)
    exponent = 254 + TOP_EXPONENT - (lax.bitcast_convert_type(top, jnp.int32) >> 23)
    exponent = jnp.minimum(exponent, 253)
    up, down = exponent << 23, (254 - exponent) << 23
    return lax.bitcast_convert_type(up, jnp.float32), lax.bitcast_convert_type(down, jnp.float32)


def cut(x: jax.Array, planes: int) -> list[jax.Array]:
    """A float32 tile as a sum of fp16 planes."""
    high = x.astype(jnp.float16)
    return [high] if planes == 1 else [high, (x - high.astype(jnp.float32)).astype(jnp.float16)]


def product(left: Sequence[jax.Array], right: Sequence[jax.Array], start: jax.Array | None = None) -> jax.Array:
    """The product of two matrices in planes, plus a start; that of both low ones is below rounding."""
    pairs = [(a, b) for i, b in enumerate(right) for j, a in enumerate(left) if i + j < 2]
    dot = [lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32) for a, b in pairs]
    return sum(dot[1:], dot[0]) if start is None else sum(dot, start)


def rotated(x: Inputs, rows: list[list[jax.Array]], at: Place, segment: int, channel: int, plan: Plan) -> jax.Array:
    """One segment of the rotated vectors, in units of the factor that `vectors` gave."""
    if not x.matrices:
        dim = plan.fmt.segments[segment].dim  # pyright: ignore[reportAttributeAccessIssue]
        tile = load(x, at, channel, padded_size(dim), plan)
        return mask_channels(tile, dim)
    return times_columns(rows, x.matrices[segment], slice(None))


def times_columns(rows: list[list[jax.Array]], matrix: Sequence[Any], columns: Any) -> jax.Array:
    """Vectors, planes of runs of channels of one width, times columns of a matrix in planes."""
    y, width = None, rows[0][0].shape[1]
    for i, planes in enumerate(rows):
        part = product(planes, [ref[i * width : (i + 1) * width, columns] for ref in matrix])
        y = part if y is None else y + part
    assert y is not None
    return y


def hadamard_tiles(x: Inputs, at: Place, plan: Plan) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
    """The rotated vectors in tiles of WIDTH channels, the factor that they lack, and their norms where known."""
    starts = range(0, plan.fmt.dim, WIDTH)
    # Loaded beside each other, before anything waits.
    [matrix] = x.matrices[0]
    signs = [matrix[start : start + WIDTH, :] for start in starts]
    tiles = [load(x, at, start, WIDTH, plan) for start in starts]
    factor, norm = jnp.full((plan.tile,), plan.factor, jnp.float32), None
    if plan.planes == 2:
        squared = tiles[0] * tiles[0]
        for tile in tiles[1:]:
            squared = perform("fma.rn.f32", tile, tile, squared, interpret=plan.interpret)
        norm = perform("sqrt.approx.f32", jnp.sum(squared, axis=1), interpret=plan.interpret)
        up, down = row_scale([norm])
        factor = factor * down
        parts = [cut(tile * up[:, None], 2) for tile in tiles]
    else:
        parts = [[tile if plan.planes == 0 else tile.astype(jnp.float16)] for tile in tiles]
    mixed = [product(part, [sign]) for part, sign in zip(parts, signs, strict=True)]
    return _sums_and_differences(mixed), factor, norm


def _sums_and_differences(tiles: list[jax.Array]) -> list[jax.Array]:
    """Tiles times the Walsh-Hadamard matrix of as many."""
    if len(tiles) == 1:
        return tiles
    half = len(tiles) // 2
    left, right = (_sums_and_differences(part) for part in (tiles[:half], tiles[half:]))
    return [a + b for a, b in zip(left, right, strict=True)] + [a - b for a, b in zip(left, right, strict=True)]
