"""What `tq-jax eval` compares: this package's caches and its rivals, in the same window."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import tq_jax as tq
from tq_jax.commands.eval.attention import AttentionQuality, compare_attention, read_back
from tq_jax.commands.language import Reference, Runner, Scheme, full_scheme, tq_scheme
from tq_jax.commands.rivals import cache as rivals_cache
from tq_jax.commands.rivals.roundings import RIVALS, Rival
from tq_jax.models import Decoder

SINKS = 4
"""First tokens in full precision where there is a window."""


@runtime_checkable
class Candidate(Runner, Protocol):
    """A scheme with what the table says of it."""

    def describe(self, decoder: Decoder) -> dict[str, Any]:
        """Name, bits, stored bits and ratios."""
        ...

    def read(self, decoder: Decoder, reference: Reference) -> tuple[Array, Array]:
        """Keys and values of the prefix as the cache gives them back, [rows, n, h_kv, d]."""
        ...


@dataclasses.dataclass(frozen=True)
class Packed:
    """A real cache.

    Attributes:
        scheme: What it holds.
        label: Short name for tables; that of the scheme by default.
        name: Likewise.
    """

    scheme: Scheme
    label: str = ""
    name: str = ""

    def describe(self, decoder: Decoder) -> dict[str, Any]:
        """See `Candidate`."""
        scheme, spec = self.scheme, self.scheme.cache
        full = full_scheme(decoder, spec.max_tokens).cache
        sizes = [jax.eval_shape(lambda s=s: decoder.init_cache(s, batch=1)).nbytes for s in (full, spec)]
        return {
            "scheme": self.name or scheme.name,
            "label": self.label or scheme.label,
            "key_bits": scheme.key_bits,
            "value_bits": scheme.value_bits,
            "stored_bits_per_element": scheme.stored_bits,
            "ratio_compressed": 16 / scheme.stored_bits,
            "ratio_total": sizes[0] / sizes[1],
        }

    def start(self, decoder: Decoder, reference: Reference) -> tq.Cache:
        """See `Runner`."""
        return self.scheme.start(decoder, reference)

    def extend(
        self, decoder: Decoder, tokens: Int[Array, "1 t"], cache: tq.Cache, *, count: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "t vocab"], tq.Cache]:
        """See `Runner`."""
        return self.scheme.extend(decoder, tokens, cache, count=count)

    def read(self, decoder: Decoder, reference: Reference) -> tuple[Array, Array]:
        """See `Candidate`."""
        keys, values = read_back(self.start(decoder, reference))
        return keys[:, : reference.prefix], values[:, : reference.prefix]


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A rival in the same window.

    Attributes:
        rival: How tokens are rounded.
        max_tokens: Tokens that a row can hold.
        window: Latest tokens in full precision.
        sinks: First tokens in full precision.
    """

    rival: Rival
    max_tokens: int
    window: int
    sinks: int

    def describe(self, decoder: Decoder) -> dict[str, Any]:
        """See `Candidate`."""
        rival, dim = self.rival, decoder.config.head_dim
        stored = rival.stored_bits(dim, decoder.config.num_layers)
        exact = min(self.window + self.sinks, self.max_tokens)
        total = (16 * exact + stored * (self.max_tokens - exact)) / self.max_tokens
        return {
            "scheme": rival.name,
            "label": rival.label,
            "key_bits": rival.key.bits,
            "value_bits": rival.value.bits,
            "stored_bits_per_element": stored,
            "ratio_compressed": 16 / stored,
            "ratio_total": 16 / total,
        }

    def start(self, decoder: Decoder, reference: Reference) -> rivals_cache.RivalCache:
        """See `Runner`."""
        config = decoder.config
        cache = rivals_cache.empty(
            self.rival,
            rows=config.num_layers,
            layers=config.num_layers,
            max_tokens=self.max_tokens,
            heads=(config.num_kv_heads, config.head_dim),
            window=self.window,
            sinks=self.sinks,
        )
        return rivals_cache.fill(cache, *reference.projections[1:], jnp.int32(reference.prefix))

    def extend(
        self,
        decoder: Decoder,
        tokens: Int[Array, "1 t"],
        cache: rivals_cache.RivalCache,
        *,
        count: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "t vocab"], rivals_cache.RivalCache]:
        """See `Runner`."""
        return rivals_cache.extend(decoder, tokens, cache, count)

    def read(self, decoder: Decoder, reference: Reference) -> tuple[Array, Array]:
        """See `Candidate`."""
        keys, values = rivals_cache.seen_everywhere(self.start(decoder, reference))
        return keys[:, : reference.prefix], values[:, : reference.prefix]


def candidates(
    decoder: Decoder, max_tokens: int, *, bits: Sequence[tuple[float, float]], window: int
) -> list[Candidate]:
    """Full precision, this package's defaults at some widths, and all rivals.

    Args:
        decoder: The model.
        max_tokens: Tokens that a cache can hold.
        bits: Key and value bits of this package's caches.
        window: Latest tokens in full precision; with none, the first tokens are not either.
    """
    sinks = SINKS if window else 0
    ours = [tq_scheme(decoder, max_tokens, key_bits=k, value_bits=v) for k, v in bits]
    ours = [dataclasses.replace(s, cache=dataclasses.replace(s.cache, window=window, sink_tokens=sinks)) for s in ours]
    packed = [Packed(scheme) for scheme in (full_scheme(decoder, max_tokens), *ours)]
    return [*packed, *(Rounded(rival, max_tokens, window, sinks) for rival in RIVALS)]


def attention_quality(
    decoder: Decoder, reference: Reference, candidate: Candidate, *, window: int, sinks: int
) -> AttentionQuality:
    """What a candidate does to attention of the prefix's last tokens.

    Args:
        decoder: The model.
        reference: The text.
        candidate: The scheme.
        window: Latest tokens that the comparison of logits leaves out.
        sinks: First tokens likewise.
    """
    config, place = decoder.config, jnp.arange(reference.prefix)
    windows = [reference.prefix if window is None else window for window in config.layer_windows]
    keys, values = candidate.read(decoder, reference)
    coded = (place >= sinks) & (place < reference.prefix - window)
    error, correlation = compare_attention(
        reference.projections, keys, values, coded, jnp.asarray(windows, jnp.int32), scale=config.attention_scale
    )
    return AttentionQuality(jax.device_get(error), jax.device_get(correlation))
