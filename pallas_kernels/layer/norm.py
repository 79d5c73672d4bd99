"""A residual sum and its root-mean-square norm."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, choose, interprets
from pallas_kernels.numerics import power_of_two
from pallas_kernels.pytree import pytree

LARGEST = 16384
"""Most channels that a program holds in registers."""

CHANNELS_PER_WARP = 512
"""Channels per warp, 16 per thread."""


@pytree
class NormWeights:
    """Weights of a root-mean-square norm (arXiv:1910.07467).

    Attributes:
        scale: [d], factor of each channel, or its distance from one.
        epsilon: Added to the mean square.
        centered: Whether `scale` is the distance from one. Such a norm multiplies before it rounds to the type of the
            hidden states, as Gemma does; the other one rounds first, as Llama does.
    """

    scale: Any
    epsilon: float = dataclasses.field(metadata={"static": True})
    centered: bool = dataclasses.field(default=False, metadata={"static": True})

    def normalize(self, x: Any, channels: int) -> Any:
        """The norm of [rows, channels or more], zero behind `channels`; `scale` is an array as long as the rows."""
        wide = x.astype(jnp.float32)
        power = jnp.sum(wide * wide, axis=1) * (1.0 / channels)  # [rows]
        return self.scaled(wide, power[:, None], self.scale[None, :], x.dtype)

    def scaled(self, wide: Any, power: Any, scale: Any, dtype: Any) -> Any:
        """Channels in float32 divided by the root of their mean square and times `scale`, in `dtype`."""
        normed = wide * lax.rsqrt(power + self.epsilon)
        if self.centered:
            return (normed * (1.0 + scale.astype(jnp.float32))).astype(dtype)
        return normed.astype(dtype) * scale.astype(dtype)


def residual_norm(
    hidden: Float[Array, "*rows d"],
    added: Float[Array, "*rows d"] | None,
    weights: NormWeights,
    *,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "*rows d"], Float[Array, "*rows d"]]:
    """The sum of hidden states and the output of a layer's part, and the norm of the sum.

    Args:
        hidden: Hidden states.
        added: What is added, in the type of the hidden states; None for nothing.
        weights: The norm.
        implementation: See `pallas_kernels.dispatch`.

    Returns:
        Sum and norm, in the type of the hidden states.

    Raises:
        NotImplementedError: For "triton" with more than LARGEST channels.

    Example:
        >>> weights = NormWeights(jnp.ones(4), epsilon=1e-6)
        >>> total, normed = residual_norm(jnp.ones((1, 4)), jnp.ones((1, 4)), weights)
        >>> total.tolist(), normed.round(3).tolist()
        ([[2.0, 2.0, 2.0, 2.0]], [[1.0, 1.0, 1.0, 1.0]])
    """
    check = functools.partial(_check, hidden.shape[-1])
    if choose(implementation, op="residual norm", check=check) == "triton":
        return by_kernel(hidden, added, weights, interpret=interprets())
    total = hidden if added is None else hidden + added
    rows = total.reshape(-1, total.shape[-1])
    return total, weights.normalize(rows, rows.shape[1]).reshape(total.shape)


def _check(channels: int) -> None:
    if channels > LARGEST:
        raise NotImplementedError(f"the kernel norms up to {LARGEST} channels, got {channels}")


def by_kernel(hidden: Array, added: Array | None, weights: NormWeights, *, interpret: bool) -> tuple[Array, Array]:
    """`residual_norm` by the kernel, one program per row."""
    shape, channels = hidden.shape, hidden.shape[-1]
    rows = jax.ShapeDtypeStruct((hidden.size // channels, channels), hidden.dtype)
    arrays = [x.reshape(rows.shape) for x in (hidden, added) if x is not None]
    found = pl.pallas_call(
        functools.partial(_body, epsilon=weights.epsilon, centered=weights.centered),
        grid=(rows.shape[0],),
        out_shape=[rows] * len(arrays),
        compiler_params=plt.CompilerParams(
            num_warps=max(1, min(16, power_of_two(channels) // CHANNELS_PER_WARP)), num_stages=1
        ),
        interpret=interpret,
        name="residual_norm",
    )(weights.scale, *arrays)
    normed = found[-1].reshape(shape)
    return (hidden if added is None else found[0].reshape(shape)), normed


def _body(scale: Any, *refs: Any, epsilon: float, centered: bool) -> None:
    """The kernel body. References: scale [d], hidden and added [rows, d], then the sum, if any, and the norm."""
    half = len(refs) // 2
    sources, targets = refs[:half], refs[half:]
    row, channels = pl.program_id(0), scale.shape[0]
    channel = lax.broadcasted_iota(jnp.int32, (power_of_two(channels),), 0)  # [d padded]
    mask = channel < channels

    def load(ref: Any, *lead: jax.Array) -> jax.Array:
        at = (*(jnp.full_like(channel, i) for i in lead), channel)
        return plt.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype))

    total = load(sources[0], row)  # [d padded], as all that follow
    if half == 2:
        total = total + load(sources[1], row)
        plt.store(targets[0].at[jnp.full_like(channel, row), channel], total, mask=mask)
    weights = NormWeights(load(scale), epsilon, centered)
    normed = weights.normalize(total[None], channels)  # [1, d padded]
    plt.store(targets[-1].at[jnp.full_like(channel, row), channel], normed[0], mask=mask)
