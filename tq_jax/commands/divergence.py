"""The effect of a compressed cache on a language model: divergence of its next-token distributions from full precision.

A text is teacher-forced. Its first part, the prefix, fills the cache (and gives the key statistics). The rest runs in
chunks, each of which is appended before its tokens attend, so that every prediction reads the cache as a decoding step
would. A query in a chunk sees at most the cache's window in full precision, and at least the window less the chunk.
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

CHUNK = 64
"""Tokens per chunk."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way to store keys and values.

    Attributes:
        name: "full" (nothing is quantized), "tq" (this project's defaults) or "turboquant" (as published).
        cache: Spec of a layer's cache.
    """

    name: str
    cache: tq.CacheSpec

    @property
    def key_bits(self) -> float:
        """Bits per key channel."""
        return self.cache.key.bits if self.cache.key else jnp.dtype(self.cache.dtype).itemsize * 8

    @property
    def value_bits(self) -> float:
        """Bits per value channel."""
        return self.cache.value.bits if self.cache.value else jnp.dtype(self.cache.dtype).itemsize * 8

    @property
    def stored_bits(self) -> float:
        """Stored bits per channel of a compressed token, scales included."""
        return self.cache.bytes_per_token() * 8 / (2 * self.cache.num_kv_heads * self.cache.head_dim)

    @property
    def label(self) -> str:
        """Short name for tables."""
        if self.name == "full":
            return self.cache.dtype
        return f"K{self.key_bits:g}/V{self.value_bits:g}" + (" as published" if self.name == "turboquant" else "")

    def nbytes(self, decoder: Decoder) -> int:
        """Bytes of a model's whole cache for one sequence, with every array that it owns."""
        return jax.eval_shape(lambda: decoder.init_cache(self.cache, batch=1)).nbytes

    def describe(self, decoder: Decoder) -> dict[str, Any]:
        """The scheme as fields of a row; see `description`."""
        ratio = full_scheme(decoder, self.cache.max_tokens).nbytes(decoder) / self.nbytes(decoder)
        return description(self.name, self.label, (self.key_bits, self.value_bits), self.stored_bits, ratio)

    def start(self, decoder: Decoder, reference: "Reference") -> tq.Cache:
        """A cache that holds the prefix, with every token of local layers too; see `Runner`."""
        whole = tq.init_cache(self.cache, batch=decoder.config.num_layers)
        return fill_cache(whole, *reference.projections, jnp.int32(reference.prefix))

    def extend(
        self, decoder: Decoder, tokens: Int[Array, "1 t"], cache: tq.Cache, *, count: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "t vocab"], tq.Cache]:
        """Appends a chunk and predicts; see `Runner`."""
        return _extend(decoder, tokens, cache, count)


def description(name: str, label: str, bits: tuple[float, float], stored: float, ratio: float) -> dict[str, Any]:
    """A way to store keys and values, as fields of a row.

    Args:
        name: Kind of scheme.
        label: Short name for tables.
        bits: Bits per key channel and per value channel.
        stored: Stored bits per channel of a compressed token, scales included.
        ratio: Bytes of a whole bfloat16 cache over bytes of this one.
    """
    return {
        "scheme": name,
        "label": label,
        "key_bits": bits[0],
        "value_bits": bits[1],
        "stored_bits_per_element": stored,
        "ratio_compressed": 16 / stored,
        "ratio_total": ratio,
    }


def full_scheme(decoder: Decoder, max_tokens: int, *, dtype: tq.CacheDtype = "bfloat16") -> Scheme:
    """Keys and values in full precision.

    Args:
        decoder: The model.
        max_tokens: Capacity of a cache row, tokens.
        dtype: Type of keys and values.
    """
    config = decoder.config
    spec = tq.CacheSpec.full_precision(
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, max_tokens=max_tokens, dtype=dtype
    )
    return Scheme("full", spec)


def tq_scheme(decoder: Decoder, max_tokens: int, *, key_bits: float, value_bits: float) -> Scheme:
    """This project's defaults, see `CacheSpec.recommended`.

    Args:
        decoder: The model.
        max_tokens: Capacity of a cache row, tokens.
        key_bits: Bits per key channel.
        value_bits: Bits per value channel.
    """
    config = decoder.config
    return Scheme(
        "tq", tq.CacheSpec.recommended(config.num_kv_heads, config.head_dim, max_tokens, key_bits, value_bits)
    )


def published_scheme(decoder: Decoder, max_tokens: int, *, key_bits: float, value_bits: float) -> Scheme:
    """TurboQuant as published (Algorithm 1, norm as scale), with the window and sink tokens of `tq_scheme`."""
    scheme = tq_scheme(decoder, max_tokens, key_bits=key_bits, value_bits=value_bits)
    plain = [tq.QuantizerSpec(dim=decoder.config.head_dim, bits=bits, scale="norm") for bits in (key_bits, value_bits)]
    spec = dataclasses.replace(scheme.cache, key=plain[0], value=plain[1], center_keys=False, smooth_keys=False)
    return Scheme("turboquant", spec)


@dataclasses.dataclass(frozen=True)
class Quality:
    """Next-token distributions of a scheme compared with full precision.

    Attributes:
        positions: Number of predictions compared.
        kl_mean: Mean of KL(full || scheme), nats.
        kl_p999: 99.9 % quantile of KL(full || scheme), nats.
        top1: Share of positions with the same most likely token.
        same: Positions before the first one whose most likely token differs.
        ppl: Perplexity of the text with the scheme.
        ppl_fp: Perplexity of the text in full precision.
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
    """A text run in full precision, with which every scheme is compared.

    Attributes:
        tokens: The text, int32 [prefix + positions + 1].
        prefix: Number of tokens that fill the cache.
        projections: Queries, keys and values of the prefix; see `Decoder.projections`.
        log_probs: Next-token log-probabilities of each chunk, float32 [chunk, vocab] on the host.
    """

    tokens: Int[Array, "n"]
    prefix: int
    projections: tuple[Array, Array, Array]
    log_probs: list[np.ndarray]


Step = Callable[[], None]
"""Called after each chunk, to show progress."""


@runtime_checkable
class Runner(Protocol):
    """A way to run a text from a cache."""

    def start(self, decoder: Decoder, reference: Reference) -> Any:
        """A cache that holds the prefix."""
        ...

    def extend(
        self, decoder: Decoder, tokens: Int[Array, "1 t"], cache: Any, *, count: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "t vocab"], Any]:
        """Appends a chunk (its first `count` tokens): next-token logits, and the cache, which is donated."""
        ...


def make_reference(decoder: Decoder, tokens: list[int], *, positions: int, advance: Step = lambda: None) -> Reference:
    """Runs a text in full precision (float32 keys and values).

    Args:
        decoder: The model.
        tokens: The text; all but the last positions + 1 tokens are the prefix.
        positions: Number of predictions to compare, rounded down to a multiple of CHUNK.
        advance: Called after each chunk.

    Raises:
        ValueError: If positions are less than a chunk, or no token is left for the prefix.
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
    """Compares predictions that read a scheme's cache with the reference.

    Args:
        decoder: The model.
        reference: The text in full precision.
        scheme: How the cache is made and extended.
        advance: Called after each chunk.
    """
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
    """Yields the logits [CHUNK, vocab] of each chunk after the prefix."""
    cache = scheme.start(decoder, reference)
    for start in range(reference.prefix, len(reference.tokens) - 1, CHUNK):
        logits, cache = scheme.extend(decoder, reference.tokens[None, start : start + CHUNK], cache)
        yield logits
        advance()


@jax.jit
def run_prompt(decoder: Decoder, tokens: Int[Array, "b t"]) -> tuple[Array, tuple[Array, Array, Array]]:
    """`Decoder.projections`, compiled: the keys and values of a prompt do not depend on the cache they go to."""
    return decoder.projections(tokens)


@functools.partial(jax.jit, donate_argnums=0)
def fill_cache(cache: tq.Cache, query: Array, key: Array, value: Array, length: Int[Array, ""]) -> tq.Cache:
    """Appends the first `length` tokens of a prompt's projections to every cache row; the cache is donated."""
    return tq.append(cache, key, value, query=query, lengths=jnp.broadcast_to(length, (cache.rows,)))


@functools.partial(jax.jit, donate_argnums=2)
def _extend(
    decoder: Decoder, tokens: Int[Array, "1 t"], cache: tq.Cache, count: Int[Array, ""] | None
) -> tuple[Float[Array, "t vocab"], tq.Cache]:
    lengths = None if count is None else count[None]
    hidden, after = decoder.extend(tokens, cache, lengths=lengths, as_stored=True)
    assert isinstance(after, tq.Cache), "one cache goes in"
    return decoder.logits(hidden)[0], after


@jax.jit
def _compare(
    full: Float[Array, "t vocab"], logits: Float[Array, "t vocab"], target: Int[Array, "t"]
) -> Float[Array, "4 t"]:
    """KL, agreement, and the negative log-likelihoods of scheme and reference, for each position."""
    found = jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(full) * (full - found), axis=-1)
    agree = (jnp.argmax(full, axis=-1) == jnp.argmax(found, axis=-1)).astype(jnp.float32)
    nll = [-jnp.take_along_axis(x, target[:, None], axis=-1)[:, 0] for x in (found, full)]
    return jnp.stack([kl, agree, *nll])
