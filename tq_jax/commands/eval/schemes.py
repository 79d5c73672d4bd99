"""The candidates of `tq-jax eval`: this package's caches and their rivals, with the same tokens in full precision."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import tq_jax as tq
from tq_jax.commands.divergence import Reference, Runner, Scheme, description, full_scheme, tq_scheme
from tq_jax.commands.eval.attention import AttentionQuality, compare_attention, read_back
from tq_jax.commands.options import require_labels
from tq_jax.commands.rivals import cache as rivals_cache
from tq_jax.commands.rivals.calibrated import fit
from tq_jax.commands.rivals.roundings import RIVALS, Rival
from tq_jax.models import Decoder

Window = TypeVar("Window", int, int | None)

SINKS = 4
"""Sink tokens, if there is a window."""


@runtime_checkable
class Candidate(Runner, Protocol):
    """A scheme with its description for tables."""

    def describe(self, decoder: Decoder) -> dict[str, Any]:
        """Name, label, bits, stored bits and ratios; see `Scheme.describe`."""
        ...

    def read(self, decoder: Decoder, reference: Reference) -> tuple[Array, Array]:
        """Keys and values of the prefix as attention reads them from the cache, [rows, n, h_kv, d]."""
        ...


@dataclasses.dataclass(frozen=True)
class Packed:
    """A real, packed cache.

    Attributes:
        scheme: How keys and values are stored.
        label: Short name for tables; the scheme's label by default.
        name: Name of the kind of scheme; the scheme's name by default.
    """

    scheme: Scheme
    label: str = ""
    name: str = ""

    def describe(self, decoder: Decoder) -> dict[str, Any]:
        """The scheme's description, under this candidate's names."""
        own = {"scheme": self.name or self.scheme.name, "label": self.label or self.scheme.label}
        return self.scheme.describe(decoder) | own

    def start(self, decoder: Decoder, reference: Reference) -> tq.Cache:
        """A cache that holds the prefix; see `Runner`."""
        return self.scheme.start(decoder, reference)

    def extend(
        self, decoder: Decoder, tokens: Int[Array, "1 t"], cache: tq.Cache, *, count: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "t vocab"], tq.Cache]:
        """Appends a chunk and predicts; see `Runner`."""
        return self.scheme.extend(decoder, tokens, cache, count=count)

    def read(self, decoder: Decoder, reference: Reference) -> tuple[Array, Array]:
        """Keys and values of the prefix as attention reads them; see `Candidate`."""
        keys, values = read_back(self.start(decoder, reference))
        return keys[:, : reference.prefix], values[:, : reference.prefix]


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A rival with the same tokens in full precision.

    Attributes:
        rival: How tokens are rounded.
        max_tokens: Capacity of a cache row, tokens.
        window: Number of latest tokens in full precision.
        sinks: Number of first tokens in full precision.
    """

    rival: Rival
    max_tokens: int
    window: int
    sinks: int

    def describe(self, decoder: Decoder) -> dict[str, Any]:
        """Name, label, bits, stored bits and ratios; see `Candidate`."""
        rival, dim = self.rival, decoder.config.head_dim
        stored = rival.stored_bits(dim, decoder.config.num_layers)
        exact = min(self.window + self.sinks, self.max_tokens)
        total = (16 * exact + stored * (self.max_tokens - exact)) / self.max_tokens
        return description(rival.name, rival.label, (rival.key.bits, rival.value.bits), stored, 16 / total)

    def start(self, decoder: Decoder, reference: Reference) -> rivals_cache.RivalCache:
        """A cache that holds the prefix; see `Runner`."""
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
        fitted = fit(self.rival, *reference.projections, reference.prefix)
        filled = rivals_cache.fill(cache, *reference.projections[1:], jnp.int32(reference.prefix))
        return dataclasses.replace(filled, fitted=fitted)

    def extend(
        self,
        decoder: Decoder,
        tokens: Int[Array, "1 t"],
        cache: rivals_cache.RivalCache,
        *,
        count: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "t vocab"], rivals_cache.RivalCache]:
        """Appends a chunk and predicts; see `Runner`."""
        return rivals_cache.extend(decoder, tokens, cache, count)

    def read(self, decoder: Decoder, reference: Reference) -> tuple[Array, Array]:
        """Keys and values of the prefix as attention reads them; see `Candidate`."""
        keys, values = rivals_cache.seen_everywhere(self.start(decoder, reference))
        return keys[:, : reference.prefix], values[:, : reference.prefix]


def candidates(
    decoder: Decoder,
    max_tokens: int,
    *,
    bits: Sequence[tuple[float, float]],
    window: int,
    rivals: Sequence[Rival] = RIVALS,
) -> list[Candidate]:
    """Full precision, this package's defaults at some widths, and rivals.

    Args:
        decoder: The model.
        max_tokens: Capacity of a cache row, tokens.
        bits: Pairs of key and value bits of this package's caches.
        window: Number of latest tokens in full precision; if it is 0, there are no sink tokens either.
        rivals: What this package's caches are compared with.
    """
    sinks = SINKS if window else 0
    ours = [tq_scheme(decoder, max_tokens, key_bits=k, value_bits=v) for k, v in bits]
    ours = [dataclasses.replace(s, cache=dataclasses.replace(s.cache, window=window, sink_tokens=sinks)) for s in ours]
    packed = [Packed(scheme) for scheme in (full_scheme(decoder, max_tokens), *ours)]
    return [*packed, *(Rounded(rival, max_tokens, window, sinks) for rival in rivals)]


def choose(
    every: Sequence[tuple[Window, Candidate]], decoder: Decoder, only: Sequence[str]
) -> list[tuple[Window, Candidate]]:
    """The candidates, with their windows, whose labels have one of some parts; all if there are none.

    Args:
        every: Windows and candidates.
        decoder: The model.
        only: Parts of labels.

    Raises:
        typer.BadParameter: If no label has one of the parts.
    """
    labels = [candidate.describe(decoder)["label"] for _, candidate in every]
    for part in only:
        require_labels(labels, part)
    chosen = (not only or any(part in label for part in only) for label in labels)
    return list(itertools.compress(every, chosen))


def attention_quality(
    decoder: Decoder, reference: Reference, candidate: Candidate, *, window: int, sinks: int
) -> AttentionQuality:
    """The effect of a candidate on the attention of the prefix's last tokens.

    Args:
        decoder: The model.
        reference: The text in full precision.
        candidate: The scheme.
        window: Number of latest tokens that the comparison of logits leaves out.
        sinks: Number of first tokens that the comparison of logits leaves out.
    """
    config, place = decoder.config, jnp.arange(reference.prefix)
    windows = [reference.prefix if window is None else window for window in config.layer_windows]
    keys, values = candidate.read(decoder, reference)
    coded = (place >= sinks) & (place < reference.prefix - window)
    error, correlation = compare_attention(
        *(reference.projections, keys, values, coded, jnp.asarray(windows, jnp.int32)),
        _sink_logits(decoder),
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )
    return AttentionQuality(jax.device_get(error), jax.device_get(correlation))


def _sink_logits(decoder: Decoder) -> Float[Array, "rows h_q"] | None:
    """The learned logits of all layers; None if there are none."""
    found: list[Any] = [getattr(block, "attention").sinks for block in decoder.blocks]  # noqa: B009
    return None if found[0] is None else jnp.concatenate([sinks[...] for sinks in found])
