"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tq_jax.plain import make_plain, number, whole


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn; static and hashable.

    Attributes:
        temperature: Divisor of the logits; 0 takes the most likely token. Numbers outside float32's range count as its
            smallest or largest one.
        top_k: Draw only from this many most likely tokens, and from tokens as likely as the last of them; None draws
            from all.
        top_p: After `top_k`, draw only from the fewest most likely tokens whose total probability reaches `top_p`
            (nucleus sampling, arXiv:1904.09751); None draws from all.

    Raises:
        ValueError: If a value is out of range, or if `top_k` or `top_p` is given at temperature 0, where it would have
            no effect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        make_plain(self, temperature=number, top_k=whole, top_p=number)
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.temperature == 0.0 and not (self.top_k is None and self.top_p is None):
            raise ValueError(
                f"temperature: expected more than 0 with top_k or top_p, got 0 with top_k={self.top_k}, "
                f"top_p={self.top_p}"
            )


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw one token per row of logits.

    Args:
        logits: float32 [b, vocab_size].
        keys: Random keys [b], one per row.
        sampling: How tokens are drawn.

    Returns:
        int32 [b], token ids.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 1)
        >>> sample(jnp.array([[0.0, 3.0, 1.0]]), keys, Sampling(temperature=0.7, top_k=1)).tolist()
        [1]
    """
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Less the largest one, logits divided by a tiny number leave float32's range on the side of improbable tokens only.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    limits = np.finfo(np.float32)
    logits = logits / np.float32(np.clip(sampling.temperature, limits.tiny, limits.max))
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        logits = jnp.where(logits < _nucleus_edge(logits, sampling.top_p), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus_edge(logits: jax.Array, top_p: float) -> jax.Array:
    """The smallest logit that nucleus sampling keeps, [b, 1] (arXiv:1904.09751)."""
    falling = -jnp.sort(-logits, axis=-1)
    weight = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(weight, axis=-1) - weight
    return jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
