"""Rotary position embedding, half-split: channel i turns with channel i + head_dim / 2 (arXiv:2104.09864)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layer.heads import Turn

ScalingKind = Literal["linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the one that the model was first trained on.

    Attributes:
        kind: "linear" divides every frequency by `factor`. "llama3" keeps frequencies that turn often within the
            original context, divides frequencies that turn seldom, and blends in between. "yarn" does so with limits in
            numbers of pairs (arXiv:2309.00071). "longrope" divides each frequency by a number of its own
            (arXiv:2402.13753).
        factor: The divisor; at least 1. For "longrope" it only gives the default of `attention_factor`.
        low_freq_factor: For "llama3": frequencies of fewer turns within the original context are divided.
        high_freq_factor: For "llama3": frequencies of more turns within the original context are kept.
        original_context: Tokens of the original context; not for "linear".
        beta_fast: For "yarn": frequencies of more turns within the original context are kept.
        beta_slow: For "yarn": frequencies of fewer turns within the original context are divided.
        whole_pairs: For "yarn": whether the limits are rounded to whole channel pairs.
        attention_factor: For "yarn" and "longrope": factor of rotated queries and of rotated keys; None for that of the
            papers.
        divisors: For "longrope": the divisor of each frequency.
        short_divisors: For "longrope": those of decoders whose context is no longer than the original one, see
            `for_context`.

    Raises:
        ValueError: If the numbers contradict each other.
    """

    kind: ScalingKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_pairs: bool = True
    attention_factor: float | None = None
    divisors: tuple[float, ...] = ()
    short_divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScalingKind):
            kinds = " or ".join(map(repr, get_args(ScalingKind)))
            raise ValueError(f"rope scaling: expected {kinds}, got {self.kind!r}")
        if not self.factor >= 1:
            raise ValueError(f"rope scaling: expected a factor of at least 1, got {self.factor!r}")
        for slow, fast in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, slow) < getattr(self, fast) or self.original_context < 1:
                raise ValueError(
                    f"rope scaling: expected 0 < {slow} < {fast} and a positive original_context, got "
                    f"{getattr(self, slow)}, {getattr(self, fast)} and {self.original_context}"
                )
        for divisors in (self.divisors, self.short_divisors):
            if (self.kind == "longrope") != bool(divisors) or not all(divisor > 0 for divisor in divisors):
                raise ValueError(f"rope scaling: expected positive divisors for 'longrope' only, got {divisors}")

    @property
    def length(self) -> float:
        """Factor of cosine and sine."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))
        return 1.0

    def for_context(self, max_context: int) -> RopeScaling:
        """The scaling of a decoder that attends over at most `max_context` tokens.

        Which divisors of "longrope" hold is one choice for all tokens of a sequence: keys that are already in a cache
        turn no more.
        """
        if self.kind != "longrope" or max_context > self.original_context:
            return self
        return dataclasses.replace(self, divisors=self.short_divisors)


def rotary_frequencies(
    *, head_dim: int, base: float, scaling: RopeScaling | None = None, rotary_dim: int | None = None
) -> jax.Array:
    """Angles by which each channel pair turns from one token to the next.

    Args:
        head_dim: Channels of one head; even.
        base: Base of the geometric progression of frequencies.
        scaling: How the frequencies are stretched; None if they are not.
        rotary_dim: Channels that turn, see `partial_order`; None for all.

    Returns:
        float32 [head_dim / 2], radians per token; zero for pairs that do not turn.

    Example:
        >>> rotary_frequencies(head_dim=4, base=100.0, scaling=RopeScaling(kind="linear", factor=2.0)).tolist()
        [0.5, 0.05000000074505806]
    """
    if rotary_dim is not None and rotary_dim < head_dim:
        still = jnp.zeros((head_dim - rotary_dim) // 2, jnp.float32)
        if rotary_dim == 0:
            return still
        return jnp.concatenate([rotary_frequencies(head_dim=rotary_dim, base=base, scaling=scaling), still])
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / jnp.float32(head_dim)
    frequency = jnp.float32(1.0) / jnp.float32(base) ** exponent
    if scaling is None:
        return frequency
    if scaling.kind == "longrope":
        return frequency / jnp.asarray(scaling.divisors, jnp.float32)
    slow = frequency / jnp.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "yarn":
        share = _kept_by_yarn(scaling, head_dim=head_dim, base=base)
    else:
        turns = frequency * jnp.float32(scaling.original_context / (2 * math.pi))
        width = scaling.high_freq_factor - scaling.low_freq_factor
        share = jnp.clip((turns - jnp.float32(scaling.low_freq_factor)) / jnp.float32(width), 0.0, 1.0)
    return (1.0 - share) * slow + share * frequency


def _kept_by_yarn(scaling: RopeScaling, *, head_dim: int, base: float) -> jax.Array:
    """The share of each frequency, float32 [head_dim / 2], that stays as it is."""

    def pair(turns: float) -> float:
        """The channel pair, in general a fraction, that turns so often within the original context."""
        return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # The reference implementation avoids a division by zero in this way.
    width = last - first or 0.001
    return 1.0 - jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - first) / width, 0.0, 1.0)


def rotary_turn(
    positions: jax.Array,
    *,
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
    rotary_dim: int | None = None,
) -> Turn:
    """How each channel pair of each token is turned.

    Args:
        positions: int32 [b, t], the position of each token in its sequence.
        head_dim: Channels of one head; even.
        base: Base of the geometric progression of frequencies.
        scaling: How the frequencies are stretched; None if they are not.
        rotary_dim: Channels of a head that turn, see `partial_order`; None for all.

    Returns:
        Cosine and sine of the angles.

    Example:
        >>> cos, sin = rotary_turn(jnp.array([[0, 3]]), head_dim=4, base=100.0)
        >>> bool(jnp.allclose(jnp.arctan2(sin, cos)[0, 1], jnp.array([3.0, 0.3])))
        True
    """
    frequency = rotary_frequencies(head_dim=head_dim, base=base, scaling=scaling, rotary_dim=rotary_dim)
    angles = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is None or scaling.length == 1:
        return cos, sin
    length = jnp.where(frequency > 0, jnp.float32(scaling.length), 1.0)[None, None, :]
    return cos * length, sin * length


def partial_order(*, head_dim: int, rotary_dim: int) -> np.ndarray:
    """The channels of a head of which only some turn, in the order that the decoder has them.

    Files have the channels that turn first, and channel i turns with channel i + rotary_dim / 2. The decoder pairs
    channel i with channel i + head_dim / 2; the pairs that turn come first. Products of queries and keys are the same.

    Args:
        head_dim: Channels of one head; even.
        rotary_dim: Channels that turn; even.

    Returns:
        int [head_dim], the channel in files of each channel here.

    Example:
        >>> partial_order(head_dim=8, rotary_dim=4).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    turning, still = np.arange(rotary_dim).reshape(2, -1), np.arange(rotary_dim, head_dim).reshape(2, -1)
    return np.concatenate([turning, still], axis=1).reshape(-1)
