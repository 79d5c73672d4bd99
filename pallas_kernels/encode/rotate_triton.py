"""Rotation of a tile of vectors by tensor cores, exact to float32 rounding.

Each vector is scaled by a power of two and cut into a high and a low fp16 plane, and so is the matrix unless its
entries are signs; bfloat16 vectors that are not centred are multiplied as they are. The Walsh-Hadamard matrix of
n * 16 channels is the Kronecker product of those of n and of 16 channels: each tile of 16 channels is multiplied by the
latter, then tiles are added and subtracted.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.encode.loads_triton import Place, load, load_channels, mask_channels, padded_size
from pallas_kernels.encode.plan import EncodeInputs, EncodePlan
from pallas_kernels.numerics import EXPONENT_BIAS, MANTISSA_BITS
from pallas_kernels.tiles.intrinsics_triton import perform

TOP_EXPONENT = 12
"""Binary exponent of the largest channel, or of the norm, of a scaled vector that is cut into fp16 planes."""

MATRIX_GAIN = 1024.0
"""Factor of the fp16 planes of a matrix: the low plane holds normal numbers."""

WIDTH = 16
"""Channels of a tile of `hadamard_tiles`."""


def vectors(x: EncodeInputs, at: Place, plan: EncodePlan) -> tuple[list[list[jax.Array]], jax.Array]:
    """Loads a tile of vectors for a rotation.

    Returns:
        Planes [tile, chunk] of each chunk of channels, none without a rotation; float32 [tile], the factor that undoes
        the scaling of vectors and matrix.
    """
    one = jnp.ones((plan.tile,), jnp.float32)
    if not x.matrices:
        return [], one
    padded = x.matrices[0][0].shape[0]
    # [tile, chunk] each; the factors are [tile].
    chunks = [load(x, at, start, plan.chunk, plan) for start in range(0, padded, plan.chunk)]
    if not plan.planes:
        return [[chunk] for chunk in chunks], one * plan.factor
    up, down = row_scale([jnp.max(jnp.abs(chunk), axis=1) for chunk in chunks])
    return [cut(chunk * up[:, None], plan.planes) for chunk in chunks], down * plan.factor


def row_scale(largest: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The power of two that brings the largest of some magnitudes to 2**TOP_EXPONENT, and its inverse.

    Args:
        largest: float32 [tile] each.

    Returns:
        float32 [tile] each.
    """
    top = largest[0]
    for other in largest[1:]:
        top = jnp.maximum(top, other)
    # Biased exponents: twice the bias less one gives the inverse of a power of two, and 253 is the largest with one.
    exponent = 2 * EXPONENT_BIAS + TOP_EXPONENT - (lax.bitcast_convert_type(top, jnp.int32) >> MANTISSA_BITS)
    exponent = jnp.minimum(exponent, 2 * EXPONENT_BIAS - 1)
    up, down = exponent << MANTISSA_BITS, (2 * EXPONENT_BIAS - exponent) << MANTISSA_BITS
    return lax.bitcast_convert_type(up, jnp.float32), lax.bitcast_convert_type(down, jnp.float32)


def cut(x: jax.Array, planes: int) -> list[jax.Array]:
    """A float32 tile as a sum of one or two fp16 planes, shaped like the tile."""
    high = x.astype(jnp.float16)
    return [high] if planes == 1 else [high, (x - high.astype(jnp.float32)).astype(jnp.float16)]


def product(left: Sequence[jax.Array], right: Sequence[jax.Array], start: jax.Array | None = None) -> jax.Array:
    """The product of two matrices in planes, plus a start; the product of the two low planes is below rounding.

    Args:
        left: Planes [tile, k].
        right: Planes [k, n].
        start: float32 [tile, n].

    Returns:
        float32 [tile, n].
    """
    pairs = [(a, b) for i, b in enumerate(right) for j, a in enumerate(left) if i + j < 2]
    dot = [lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32) for a, b in pairs]
    return sum(dot[1:], dot[0]) if start is None else sum(dot, start)


def rotated(
    x: EncodeInputs, rows: list[list[jax.Array]], at: Place, segment: int, channel: int, plan: EncodePlan
) -> jax.Array:
    """One segment of the rotated vectors, over the factors that `vectors` gave.

    Args:
        x: The inputs.
        rows: Planes that `vectors` gave.
        at: Place of each vector.
        segment: Number of the segment.
        channel: Its first channel.
        plan: The plan.

    Returns:
        float32 [tile, padded channels of the segment].
    """
    if not x.matrices:
        dim = plan.fmt.segments[segment].dim  # pyright: ignore[reportAttributeAccessIssue]
        tile = load(x, at, channel, padded_size(dim), plan)
        return mask_channels(tile, dim)
    return times_columns(rows, x.matrices[segment], slice(None))


def times_columns(rows: list[list[jax.Array]], matrix: Sequence[Any], columns: Any) -> jax.Array:
    """Vectors times columns of a matrix.

    Args:
        rows: Planes [tile, chunk] of each chunk of channels.
        matrix: References to planes [chunks * chunk, channels].
        columns: Slice of the matrix's channels.

    Returns:
        float32 [tile, columns].
    """
    y, width = None, rows[0][0].shape[1]
    for i, planes in enumerate(rows):
        part = product(planes, [ref[i * width : (i + 1) * width, columns] for ref in matrix])
        y = part if y is None else y + part
    assert y is not None
    return y


def hadamard_tiles(x: EncodeInputs, at: Place, plan: EncodePlan) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
    """Rotates vectors by a Walsh-Hadamard matrix.

    Returns:
        Tiles [tile, WIDTH] of the rotated vectors over their factors; the factors [tile]; the norms [tile] of the
        vectors, None where they are not known.
    """
    starts = range(0, plan.fmt.dim, WIDTH)
    # All loads come first: they run while nothing waits for them.
    [matrix] = x.matrices[0]  # [dim, WIDTH]
    signs = [matrix[start : start + WIDTH, :] for start in starts]  # [WIDTH, WIDTH] each
    tiles = [load(x, at, start, WIDTH, plan) for start in starts]  # [tile, WIDTH] each
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
    # Products are [tile, WIDTH] each.
    mixed = [product(part, [sign]) for part, sign in zip(parts, signs, strict=True)]
    return _sums_and_differences(mixed), factor, norm


def hadamard_vector(x: EncodeInputs, at: Place, plan: EncodePlan) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Rotates the vector of a program of one token by a Walsh-Hadamard matrix.

    The runs of WIDTH channels are the rows of one product, which is then multiplied by the matrix of the runs.

    Returns:
        Tiles [1, WIDTH] as of `hadamard_tiles`; the factor [1]; the norm [1] of the vector.
    """
    shape, count = (WIDTH, WIDTH), plan.fmt.dim // WIDTH
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    channel, exists = row * WIDTH + column, row < count
    [matrix] = x.matrices[0]  # [dim, WIDTH]
    # The first column of a Walsh-Hadamard matrix is ones, so the first column of `matrix` is the signs of the channels.
    signs = plt.load(matrix.at[channel, jnp.zeros_like(channel)], mask=exists, other=0).astype(jnp.float32)
    own = plt.load(matrix.at[row, jnp.zeros_like(row)]).astype(jnp.float32)
    walsh = matrix[:WIDTH, :].astype(jnp.float32) * own
    y = load_channels(x, at, channel, plan, padded=True).astype(jnp.float32) * signs
    norm = perform("sqrt.approx.f32", _total(y * y), interpret=plan.interpret)
    factor = jnp.full((1,), plan.factor, jnp.float32)
    if plan.planes == 2:
        up, down = row_scale([norm])
        factor, parts = factor * down, cut(y * up[:, None], 2)
    else:
        parts = [y.astype(jnp.float16 if plan.planes else jnp.bfloat16)]
    mixed = product(parts, [walsh.astype(parts[0].dtype)])
    tiles = []
    for i in range(count):
        # An entry of the matrix of the runs is negative if its row and column numbers share an odd count of ones.
        shared = row & i
        shared = shared ^ (shared >> 2)
        odd = (shared ^ (shared >> 1)) & 1
        tiles.append(jnp.sum(jnp.where(odd == 1, -mixed, mixed), axis=0)[None, :])
    return tiles, factor, norm


def _total(tile: jax.Array) -> jax.Array:
    """The sum of a tile, [1]."""
    return jnp.broadcast_to(jnp.sum(jnp.sum(tile, axis=1), axis=0), (1,))


def _sums_and_differences(tiles: list[jax.Array]) -> list[jax.Array]:
    """Tiles [tile, WIDTH] times the Walsh-Hadamard matrix that has a row per tile."""
    if len(tiles) == 1:
        return tiles
    half = len(tiles) // 2
    left, right = (_sums_and_differences(part) for part in (tiles[:half], tiles[half:]))
    return [a + b for a, b in zip(left, right, strict=True)] + [a - b for a, b in zip(left, right, strict=True)]
