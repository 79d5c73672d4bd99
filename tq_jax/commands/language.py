"""What a compressed cache does to a language model: divergence of its next-token distributions from full precision.

A text is teacher-forced. Its first half fills the cache (and gives the key statistics); the second half runs in chunks
that are appended and then attended to, so that every prediction reads the cache as a decoding step would. A query in a
chunk sees at most the cache's window in full precision, and at least the window less the chunk.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import tq_jax as tq
from tq_jax.models import Decoder
from tq_jax.quantizer import FRACTIONAL_BITS, INTEGER_BITS

CHUNK = 64
"""Tokens that are appended at a time."""

BITS = frozenset(map(float, INTEGER_BITS + FRACTIONAL_BITS))
"""Bits that keys and values can have."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way to keep keys and values.

    Attributes:
        name: "full" (nothing is quantized), "tq" (this project's defaults) or "turboquant" (as published).
        cache: What the cache of a layer holds.
    """

    name: str
    cache: tq.CacheSpec

    @property
    def key_bits(self) -> float:
        """Bits a key coordinate."""
        return self.cache.key.bits if self.cache.key else jnp.dtype(self.cache.dtype).itemsize * 8

    @property
    def value_bits(self) -> float:
        """Bits a value coordinate."""
        return self.cache.value.bits if self.cache.value else jnp.dtype(self.cache.dtype).itemsize * 8

    @property
    def stored_bits(self) -> float:
        """Stored bits a coordinate of compressed tokens, scales included."""
        return self.cache.bytes_per_token() * 8 / (2 * self.cache.num_kv_heads * self.cache.head_dim)

    @property
    def label(self) -> str:
        """Short name for tables."""
        if self.name == "full":
            return self.cache.dtype
        return f"K{self.key_bits:g}/V{self.value_bits:g}" + (" as published" if self.name == "turboquant" else "")

    def start(self, decoder: Decoder, reference: "Reference") -> tq.Cache:
        """See `Runner`."""
        return fill_cache(decoder.init_cache(self.cache, batch=1), *reference.projections, jnp.int32(reference.prefix))

    def extend(
        self, decoder: Decoder, tokens: Int[Array, "1 t"], cache: tq.Cache, *, count: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "t vocab"], tq.Cache]:
        """See `Runner`."""
        return _extend(decoder, tokens, cache, count)


def full_scheme(decoder: Decoder, max_tokens: int, *, dtype: tq.CacheDtype = "bfloat16") -> Scheme:
    """Keys and values as they are."""
    config = decoder.config
    spec = tq.CacheSpec.full_precision(
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, max_tokens=max_tokens, dtype=dtype
    )
    return Scheme("full", spec)


def tq_scheme(decoder: Decoder, max_tokens: int, *, key_bits: float, value_bits: float) -> Scheme:
    """This project's defaults, `CacheSpec.recommended`."""
    config = decoder.config
    return Scheme(
        "tq", tq.CacheSpec.recommended(config.num_kv_heads, config.head_dim, max_tokens, key_bits, value_bits)
    )


def published_scheme(decoder: Decoder, max_tokens: int, *, key_bits: float, value_bits: float) -> Scheme:
    """TurboQuant as published (Algorithm 1, norm as scale) in the same cache: same window, same sink tokens."""
    scheme = tq_scheme(decoder, max_tokens, key_bits=key_bits, value_bits=value_bits)
    plain = [tq.QuantizerSpec(dim=decoder.config.head_dim, bits=bits, scale="norm") for bits in (key_bits, value_bits)]
    spec = dataclasses.replace(scheme.cache, key=plain[0], value=plain[1], center_keys=False, smooth_keys=False)
    return Scheme("turboquant", spec)


@dataclasses.dataclass(frozen=True)
class Quality:
    """Next-token distributions of a scheme against those of full precision, over `positions` positions.

    Attributes:
        positions: Predictions compared.
        kl_mean: Mean of KL(full || scheme), nats.
        kl_p999: 99.9 % quantile of the same.
        top1: Share of positions with the same most likely token.
        same: Positions before the first whose most likely token differs.
        ppl: Perplexity of the text.
        ppl_fp: Perplexity in full precision.
    """

    positions: int
    kl_mean: float
    kl_p999: float
    top1: float
    same: int
    ppl: float
    ppl_fp: float


@dataclasses.dataclass(frozen=True)
class Reference:
    """A text in full precision: what every scheme is compared with.

    Attributes:
        tokens: int32 [prefix + positions + 1].
        prefix: Tokens that fill the cache.
        projections: Queries, keys and values of the prefix, see `Decoder.projections`.
        log_probs: Next-token log-probabilities of each chunk, float32 [chunk, vocab] on the host.
    """

    tokens: Int[Array, "n"]
    prefix: int
    projections: tuple[Array, Array, Array]
    log_probs: list[np.ndarray]


Step = Callable[[], None]


@runtime_checkable
class Runner(Protocol):
    """How a text runs from a cache."""

    def start(self, decoder: Decoder, reference: Reference) -> Any:
        """A cache that holds the prefix."""
        ...

    def extend(
        self, decoder: Decoder, tokens: Int[Array, "1 t"], cache: Any, *, count: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "t vocab"], Any]:
        """Appends a chunk, or the first `count` tokens of it: what follows each, and the cache, which is donated."""
        ...


def make_reference(decoder: Decoder, tokens: list[int], *, positions: int, advance: Step = lambda: None) -> Reference:
    """Runs a text in full precision (float32 keys and values).

    Args:
        decoder: The model.
        tokens: The text; positions + 1 of them follow the prefix.
        positions: Predictions to compare; rounded down to a multiple of CHUNK.
        advance: Called after each chunk.

    Raises:
        ValueError: If the text is not longer than its predictions.
    """
    positions -= positions % CHUNK
    prefix = len(tokens) - positions - 1
    if positions < CHUNK or prefix < 1:
        raise ValueError(
            f"expected at least {CHUNK} positions and a text longer than {positions + 1} tokens, got {len(tokens)}"
        )
    ids = jnp.asarray(tokens, jnp.int32)
    _, projections = run_prompt(decoder, ids[None, :prefix])
    scheme = full_scheme(decoder, len(tokens), dtype="float32")
    reference = Reference(ids, prefix, projections, [])
    for logits in _chunks(decoder, reference, scheme, advance):
        reference.log_probs.append(np.asarray(jax.nn.log_softmax(logits)))
    return reference


def measure(decoder: Decoder, reference: Reference, scheme: Runner, *, advance: Step = lambda: None) -> Quality:
    """Compares the predictions that read a cache with those of the reference."""
    found: list[np.ndarray] = []
    for index, logits in enumerate(_chunks(decoder, reference, scheme, advance)):
        start = reference.prefix + index * CHUNK + 1
        target = reference.tokens[start : start + CHUNK]
        found.append(np.asarray(_compare(jnp.asarray(reference.log_probs[index]), logits, target)))
    kl, agree, nll, nll_full = np.concatenate(found, axis=1).astype(np.float64)
    return Quality(
        positions=kl.size,
        kl_mean=float(kl.mean()),
        kl_p999=float(np.quantile(kl, 0.999)),
        top1=float(agree.mean()),
        same=int(np.argmin(agree)) if agree.min() < 1 else agree.size,
        ppl=float(np.exp(nll.mean())),
        ppl_fp=float(np.exp(nll_full.mean())),
    )


def _chunks(decoder: Decoder, reference: Reference, scheme: Runner, advance: Step):
    """Yields logits [CHUNK, vocab] of each chunk after the prefix."""
    cache = scheme.start(decoder, reference)
    for start in range(reference.prefix, len(reference.tokens) - 1, CHUNK):
        logits, cache = scheme.extend(decoder, reference.tokens[None, start : start + CHUNK], cache)
        yield logits
        advance()


@jax.jit
def run_prompt(decoder: Decoder, tokens: Int[Array, "b t"]) -> tuple[Array, tuple[Array, Array, Array]]:
    """`Decoder.projections`, compiled: what a prompt puts into a cache does not depend on the cache."""
    return decoder.projections(tokens)


@functools.partial(jax.jit, donate_argnums=0)
def fill_cache(cache: tq.Cache, query: Array, key: Array, value: Array, length: Int[Array, ""]) -> tq.Cache:
    """Appends the first `length` tokens of a prompt's projections to every row; the cache is donated."""
    return tq.append(cache, key, value, query=query, lengths=jnp.broadcast_to(length, (cache.rows,)))


@functools.partial(jax.jit, donate_argnums=2)
def _extend(
    decoder: Decoder, tokens: Int[Array, "1 t"], cache: tq.Cache, count: Int[Array, ""] | None
) -> tuple[Float[Array, "t vocab"], tq.Cache]:
    hidden, cache = decoder.extend(tokens, cache, lengths=None if count is None else count[None])
    return decoder.logits(hidden)[0], cache


@jax.jit
def _compare(
    full: Float[Array, "t vocab"], logits: Float[Array, "t vocab"], target: Int[Array, "t"]
) -> Float[Array, "4 t"]:
    """KL, agreement and both negative log-likelihoods of each position."""
    found = jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(full) * (full - found), axis=-1)
    agree = (jnp.argmax(full, axis=-1) == jnp.argmax(found, axis=-1)).astype(jnp.float32)
    nll = [-jnp.take_along_axis(x, target[:, None], axis=-1)[:, 0] for x in (found, full)]
    return jnp.stack([kl, agree, *nll])
