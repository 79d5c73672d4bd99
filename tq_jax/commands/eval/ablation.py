"""The worth of each part of this package's caches: steps from published to default, and variants of the default."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tq_jax.commands.divergence import Scheme, published_scheme, tq_scheme
from tq_jax.commands.eval.schemes import SINKS, Packed
from tq_jax.commands.eval.statistics import Smoothed, Turned
from tq_jax.commands.options import BITS
from tq_jax.models import Decoder

Changes = dict[str, Any]
"""Changed fields of a cache spec; "key" and "value" hold changed fields of their quantizers."""

PLAIN = {"center_keys": False, "smooth_keys": False}
NO_SEARCH = {"key": {"search": False}, "value": {"search": False}}
STEPS: dict[str, Changes] = {
    "+ unbiased keys, least-squares values": PLAIN | NO_SEARCH,
    "+ step search": PLAIN,
    "+ centred keys": {"smooth_keys": False},
}
"""Steps from the published algorithm to the defaults; the last step, smoothed keys, gives the defaults."""

OTHERS: dict[str, Changes] = {
    "keys least squares": {"key": {"scale": "least_squares"}},
    "keys matched": {"key": {"scale": "matched"}},
    "values matched": {"value": {"scale": "matched"}},
    "values unbiased": {"value": {"scale": "unbiased"}},
    "Haar rotation": {"key": {"rotation": "haar"}, "value": {"rotation": "haar"}},
    "float32 scales": {"key": {"scale_dtype": "float32"}, "value": {"scale_dtype": "float32"}},
    "float32 window": {"dtype": "float32"},
    "no sink tokens": {"sink_tokens": 0},
}
"""One change to the defaults per line."""

POWERS = {
    "smoothing as in theory": (0.5, 0.5),
    "less smoothing by queries": (0.25, 0.5),
    "smoothing by keys alone": (0.0, 0.4),
}
"""Exponents of the queries' and of the keys' spread in the weight of a channel; both are BALANCE by default."""

SPLITS = (1, -1)
"""Bits moved from values to keys, where codes of such widths exist."""


def variants(decoder: Decoder, max_tokens: int, *, bits: Sequence[tuple[float, float]], window: int) -> list[Packed]:
    """The published algorithm, the steps to this package's caches, and variants of these caches.

    Args:
        decoder: The model.
        max_tokens: Capacity of a cache row, tokens.
        bits: Pairs of key and value bits.
        window: Number of latest tokens in full precision; if it is 0, there are no sink tokens either.
    """
    found: list[Packed] = []
    exact = {"window": window, "sink_tokens": SINKS if window else 0}
    for key_bits, value_bits in bits:
        sizes = {"key_bits": key_bits, "value_bits": value_bits}
        ours = _changed(tq_scheme(decoder, max_tokens, **sizes), exact)
        plain = _changed(published_scheme(decoder, max_tokens, **sizes), exact)
        found += [Packed(plain), *(_named(ours, name, changes) for name, changes in STEPS.items()), Packed(ours)]
        found += [_named(ours, name, changes) for name, changes in OTHERS.items() if window or name != "no sink tokens"]
        for name, powers in POWERS.items():
            found.append(Smoothed(ours, f"{ours.label}, {name}", "ablation", powers))
        found.append(Turned(ours, f"{ours.label}, mean that turns", "ablation"))
        for moved in SPLITS:
            moved_bits = key_bits + moved, value_bits - moved
            if BITS.issuperset(moved_bits):
                split = tq_scheme(decoder, max_tokens, key_bits=moved_bits[0], value_bits=moved_bits[1])
                found.append(Packed(_changed(split, exact), name="ablation"))
    return found


def _named(scheme: Scheme, name: str, changes: Changes) -> Packed:
    return Packed(_changed(scheme, changes), f"{scheme.label}, {name}", "ablation")


def _changed(scheme: Scheme, changes: Changes) -> Scheme:
    spec = scheme.cache
    inner = {
        name: dataclasses.replace(getattr(spec, name), **change)
        for name, change in changes.items()
        if isinstance(change, dict)
    }
    return dataclasses.replace(scheme, cache=dataclasses.replace(spec, **(changes | inner)))
