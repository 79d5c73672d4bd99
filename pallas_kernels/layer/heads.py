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


@pytree
class JointHeads:
    """The product of a layer's joined projections, and what makes heads of it; a pytree of arrays or references.

    Attributes:
        product: [b, t, h_kv, parts, d], of each KV head its g query heads, its key head and its value head; parts =
            g + 2.
        turn: Rotary positions (arXiv:2104.09864).
        query_norm: Norm of query heads; None for none.
        key_norm: Norm of key heads; None if there is no norm of query heads either.
    """

    product: Any
    turn: Turn
    query_norm: NormWeights | None = None
    key_norm: NormWeights | None = None

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        """Shape of the query heads, [b, t, h_q, d]."""
        b, t, h_kv, parts, d = self.product.shape
        return b, t, h_kv * (parts - 2), d

    def split(self, *, implementation: Implementation = "auto") -> Heads:
        """The heads; see `split_heads`."""
        norms = {"query_norm": self.query_norm, "key_norm": self.key_norm}
        return split_heads(self.product, self.turn, **norms, implementation=implementation)


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
        return by_kernel(JointHeads(joint, turn, query_norm, key_norm), interpret=interprets())
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


def holds_heads(parts: int, d: int) -> bool:
    """Whether a program holds the heads of a KV head."""
    return power_of_two(parts) * power_of_two(d) <= LARGEST


def _check(parts: int, d: int) -> None:
    if not holds_heads(parts, d):
        raise NotImplementedError(f"the kernel splits up to {LARGEST} channels of a KV head, got {parts} heads of {d}")


def by_kernel(x: JointHeads, *, interpret: bool) -> Heads:
    """`split_heads` by the kernel, one program per token and KV head."""
    b, t, h_kv, parts, d = x.product.shape
    query = jax.ShapeDtypeStruct(x.query_shape, x.product.dtype)
    other = jax.ShapeDtypeStruct((b, t, h_kv, d), x.product.dtype)
    channels = power_of_two(parts) * power_of_two(d)
    [heads] = pl.pallas_call(
        _body,
        grid=(h_kv, t, b),
        out_shape=[Heads(query, other, other)],
        compiler_params=plt.CompilerParams(num_warps=max(1, min(8, channels // CHANNELS_PER_WARP)), num_stages=1),
        interpret=interpret,
        name="split_heads",
    )(x)
    return heads


def _body(x: JointHeads, out: Heads) -> None:
    """The kernel body. All arguments are references."""
    head, token, sequence = (pl.program_id(axis) for axis in range(3))
    move_heads(x, out, (sequence, token, head))


def move_heads(x: JointHeads, out: Heads, where: tuple[jax.Array, ...]) -> None:
    """Norms, turns and writes the heads of a sequence, token and KV head, in a kernel; arguments are references."""
    group = x.product.shape[3] - 2
    head = where[2]
    _move(x, out.query, (0, group), where, head * group, turn=x.turn, norm=x.query_norm)
    _move(x, out.key, (group, 1), where, head, turn=x.turn, norm=x.key_norm)
    _move(x, out.value, (group + 1, 1), where, head, turn=None, norm=None)


def _move(
    x: JointHeads,
    target: Any,
    parts: tuple[int, int],
    where: tuple[jax.Array, ...],
    target_head: jax.Array,
    *,
    turn: Any,
    norm: NormWeights | None,
) -> None:
    """Norms, turns and writes some heads of a KV head; `parts` are the first of them and their number.

    Both halves of a head are tiles of their own, so that a channel and its partner lie in the same thread.
    """
    first, count = parts
    half, dtype = x.product.shape[4] // 2, x.product.dtype
    sequence, token, head = where
    shape = (power_of_two(count), power_of_two(half))
    number = lax.broadcasted_iota(jnp.int32, shape, 0)  # [heads padded, half padded], as all that follow
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)
    exists = (number < count) & (channel < half)
    load = functools.partial(_load, mask=exists)
    halves = [load(x.product, sequence, token, head, first + number, channel + offset) for offset in (0, half)]
    if norm is not None:
        wide = [half_.astype(jnp.float32) for half_ in halves]
        power = jnp.sum(wide[0] * wide[0] + wide[1] * wide[1], axis=1) * (1.0 / (2 * half))  # [heads padded]
        scales = [load(norm.scale, channel + offset) for offset in (0, half)]
        halves = [norm.scaled(w, power[:, None], scale, dtype) for w, scale in zip(wide, scales, strict=True)]
    if turn is not None:
        cos, sin = (load(factor, sequence, token, channel) for factor in turn)
        left, right = (half_.astype(jnp.float32) for half_ in halves)
        halves = [(left * cos - right * sin).astype(dtype), (right * cos + left * sin).astype(dtype)]
    for offset, out in zip((0, half), halves, strict=True):
        at = (sequence, token, target_head + number, channel + offset)
        plt.store(target.at[tuple(jnp.broadcast_to(i, shape) for i in at)], out, mask=exists)


def load_query(
    x: JointHeads, where: tuple[jax.Array, ...], channel: jax.Array, *, exists: jax.Array, mask: jax.Array
) -> jax.Array:
    """Channels of query heads; `where` is sequence, token and query head, see `_load_turned`."""
    sequence, token, head = where
    divisor = jnp.full_like(head, x.product.shape[3] - 2)
    heads = sequence, token, lax.div(head, divisor), lax.rem(head, divisor)
    return _load_turned(x, heads, channel, norm=x.query_norm, exists=exists, mask=mask)


def load_token(
    x: JointHeads, where: tuple[jax.Array, ...], channel: jax.Array, *, exists: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Channels of key heads and of value heads; `where` is sequence, token and KV head, see `_load_turned`."""
    group = x.product.shape[3] - 2
    part = jnp.full_like(where[1], group)
    key = _load_turned(x, (*where, part), channel, norm=x.key_norm, exists=exists, mask=mask)
    return key, _load(x.product, *where, part + 1, channel, mask=mask)


def _load_turned(
    x: JointHeads,
    heads: tuple[jax.Array, ...],
    channel: jax.Array,
    *,
    norm: NormWeights | None,
    exists: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Channels of heads as `move_heads` writes them, in a kernel, in any order and layout.

    Args:
        x: References.
        heads: Sequence, token, KV head and part of each head, of shapes that broadcast to that of the channels, with 1
            for each axis of channels.
        channel: int32 [...], channels.
        norm: Norm of the heads.
        exists: Whether each head exists, of the shape of the parts.
        mask: bool [...], which channels of heads that exist to load; the others are zero.

    Returns:
        [...], in the type of the product.
    """
    d, dtype = x.product.shape[4], x.product.dtype
    sequence, token, _, part = heads
    second = channel >= d // 2
    angle = jnp.where(second, channel - d // 2, channel)
    places = channel, jnp.where(second, angle, channel + d // 2)  # each channel and its partner
    own, partner = (_load(x.product, *heads, place, mask=mask) for place in places)
    if norm is not None:
        all_channels = lax.broadcasted_iota(jnp.int32, (*part.shape, power_of_two(d)), part.ndim)
        present = (all_channels < d) & exists[..., None]
        places_of_all = [jnp.broadcast_to(i, part.shape)[..., None] for i in heads]
        whole = _load(x.product, *places_of_all, all_channels, mask=present).astype(jnp.float32)
        power = jnp.sum(whole * whole, axis=part.ndim) * (1.0 / d)
        own, partner = (
            norm.scaled(values.astype(jnp.float32), power, _load(norm.scale, place, mask=mask), dtype)
            for values, place in zip((own, partner), places, strict=True)
        )
    cos, sin = (_load(factor, sequence, token, angle, mask=mask) for factor in x.turn)
    own, partner = own.astype(jnp.float32), partner.astype(jnp.float32)
    return (own * cos + jnp.where(second, partner, -partner) * sin).astype(dtype)


def _load(ref: Any, *at: Any, mask: jax.Array) -> jax.Array:
    """Elements of a reference at indices that broadcast to the mask's shape, zero where it is false."""
    index = tuple(jnp.broadcast_to(i, mask.shape) for i in at)
    return plt.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))
