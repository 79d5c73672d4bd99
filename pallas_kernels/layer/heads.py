"""Queries, keys and values out of one product, with the norms of heads and rotary positions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, choose, interprets
from pallas_kernels.layer.norm import NormWeights
from pallas_kernels.numerics import power_of_two
from pallas_kernels.pytree import pytree

LARGEST = 16384
"""Most channels of the heads that a program holds in registers."""

CHANNELS_PER_WARP = 512
"""Channels per warp, 16 per thread."""

Turn = tuple[Float[Array, "b t half"], Float[Array, "b t half"]]
"""Cosine and sine of the angles by which channel i turns with channel i + d / 2, float32."""


@pytree
class Heads:
    """The heads of a chunk.

    Attributes:
        query: [b, t, h_q, d], with rotary positions.
        key: [b, t, h_kv, d], with rotary positions.
        value: [b, t, h_kv, d].
    """

    query: Any
    key: Any
    value: Any


def split_heads(
    joint: Float[Array, "b t h_kv parts d"],
    turn: Turn,
    *,
    query_norm: NormWeights | None = None,
    key_norm: NormWeights | None = None,
    implementation: Implementation = "auto",
) -> Heads:
    """Splits the product of a layer's joined projections, norms query and key heads, and turns them.

    Args:
        joint: Of each KV head its g query heads, its key head and its value head; parts = g + 2.
        turn: Rotary positions (arXiv:2104.09864).
        query_norm: Norm of query heads; None for none.
        key_norm: Norm of key heads; None if there is no norm of query heads either.
        implementation: See `pallas_kernels.dispatch`.

    Returns:
        The heads, in the type of `joint`; computed in float32.

    Raises:
        NotImplementedError: For "triton" where the heads of a KV head are too many or too wide.

    Example:
        >>> angles = jnp.zeros((1, 3, 4))
        >>> heads = split_heads(jnp.ones((1, 3, 2, 6, 8)), (jnp.cos(angles), jnp.sin(angles)))
        >>> heads.query.shape, heads.key.shape
        ((1, 3, 8, 8), (1, 3, 2, 8))
    """
    check = functools.partial(_check, *joint.shape[-2:])
    if choose(implementation, op="heads of a layer", check=check) == "triton":
        return by_kernel(joint, turn, query_norm, key_norm, interpret=interprets())
    b, t, h_kv, parts, d = joint.shape
    query, key, value = joint[:, :, :, :-2].reshape(b, t, h_kv * (parts - 2), d), joint[..., -2, :], joint[..., -1, :]
    return Heads(turned(_normed(query, query_norm), turn), turned(_normed(key, key_norm), turn), value)


def _normed(x: Array, norm: NormWeights | None) -> Array:
    if norm is None:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return norm.normalize(rows, rows.shape[1]).reshape(x.shape)


def turned(x: Array, turn: Turn) -> Array:
    """Turns every head of every token [b, t, heads, d] by the token's angles; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (factor[:, :, None, :] for factor in turn)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _check(parts: int, d: int) -> None:
    channels = power_of_two(parts) * power_of_two(d)
    if channels > LARGEST:
        raise NotImplementedError(f"the kernel splits up to {LARGEST} channels of a KV head, got {parts} heads of {d}")


def by_kernel(
    joint: Array, turn: Turn, query_norm: NormWeights | None, key_norm: NormWeights | None, *, interpret: bool
) -> Heads:
    """`split_heads` by the kernel, one program per token and KV head."""
    b, t, h_kv, parts, d = joint.shape
    query = jax.ShapeDtypeStruct((b, t, h_kv * (parts - 2), d), joint.dtype)
    other = jax.ShapeDtypeStruct((b, t, h_kv, d), joint.dtype)
    channels = power_of_two(parts) * power_of_two(d)
    [heads] = pl.pallas_call(
        _body,
        grid=(h_kv, t, b),
        out_shape=[Heads(query, other, other)],
        compiler_params=plt.CompilerParams(num_warps=max(1, min(8, channels // CHANNELS_PER_WARP)), num_stages=1),
        interpret=interpret,
        name="split_heads",
    )(joint, turn, (query_norm, key_norm))
    return heads


def _body(joint: Any, turn: Any, norms: tuple[Any, Any], out: Heads) -> None:
    """The kernel body. All arguments are references."""
    group = joint.shape[3] - 2
    head = pl.program_id(0)
    query_norm, key_norm = norms
    _move(joint, out.query, (0, group), head * group, turn=turn, norm=query_norm)
    _move(joint, out.key, (group, 1), head, turn=turn, norm=key_norm)
    _move(joint, out.value, (group + 1, 1), head, turn=None, norm=None)


def _move(
    joint: Any, target: Any, parts: tuple[int, int], target_head: jax.Array, *, turn: Any, norm: NormWeights | None
) -> None:
    """Norms, turns and writes some heads of a KV head; `parts` are the first of them and their number.

    Both halves of a head are tiles of their own, so that a channel and its partner lie in the same thread.
    """
    first, count = parts
    half = joint.shape[4] // 2
    head, token, sequence = (pl.program_id(axis) for axis in range(3))
    shape = (power_of_two(count), power_of_two(half))
    number = lax.broadcasted_iota(jnp.int32, shape, 0)  # [heads padded, half padded], as all that follow
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)
    exists = (number < count) & (channel < half)

    def load(ref: Any, *at: Any) -> jax.Array:
        index = tuple(jnp.broadcast_to(i, shape) for i in at)
        return plt.load(ref.at[index], mask=exists, other=jnp.zeros((), ref.dtype))

    halves = [load(joint, sequence, token, head, first + number, channel + offset) for offset in (0, half)]
    if norm is not None:
        wide = [x.astype(jnp.float32) for x in halves]
        power = jnp.sum(wide[0] * wide[0] + wide[1] * wide[1], axis=1) * (1.0 / (2 * half))  # [heads padded]
        scales = [load(norm.scale, channel + offset) for offset in (0, half)]
        halves = [norm.scaled(x, power[:, None], scale, joint.dtype) for x, scale in zip(wide, scales, strict=True)]
    if turn is not None:
        cos, sin = (load(factor, sequence, token, channel) for factor in turn)
        left, right = (x.astype(jnp.float32) for x in halves)
        halves = [(left * cos - right * sin).astype(joint.dtype), (right * cos + left * sin).astype(joint.dtype)]
    for offset, x in zip((0, half), halves, strict=True):
        at = (sequence, token, target_head + number, channel + offset)
        plt.store(target.at[tuple(jnp.broadcast_to(i, shape) for i in at)], x, mask=exists)
