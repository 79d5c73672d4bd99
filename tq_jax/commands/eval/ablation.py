"""What each part of this package's caches is worth: from the published algorithm to the defaults, and beside them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tq_jax.commands.eval.schemes import SINKS, Packed
from tq_jax.commands.eval.statistics import Smoothed, Turned
from tq_jax.commands.language import BITS, Scheme, published_scheme, tq_scheme
from tq_jax.models import Decoder

Changes = dict[str, Any]
"""Fields of a cache spec; "key" and "value" are themselves fields to change in their quantizers."""

PLAIN = {"center_keys": False, "smooth_keys": False}
NO_SEARCH = {"key": {"search": False}, "value": {"search": False}}
STEPS: dict[str, Changes] = {
    "+ unbiased keys, least-squares values": PLAIN | NO_SEARCH,
    "+ step search": PLAIN,
    "+ centred keys": {"smooth_keys": False},
}
"""From published to ours, which is all of them and smoothed keys."""

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
"""One change to ours a line."""

POWERS = {
    "smoothing as in theory": (0.5, 0.5),
    "less smoothing by queries": (0.25, 0.5),
    "smoothing by keys alone": (0.0, 0.4),
}
"""Powers of the queries' and of the keys' spread in the weight of a channel; both are BALANCE in ours."""

SPLITS = (1, -1)
"""Bits given from values to keys, where there are such codes."""


def variants(decoder: Decoder, max_tokens: int, *, bits: Sequence[tuple[float, float]], window: int) -> list[Packed]:
    """This package's caches, the published algorithm, and what lies between and beside them.

    Args:
        decoder: The model.
        max_tokens: Tokens that a cache can hold.
        bits: Key and value bits.
        window: Latest tokens in full precision; with none, the first tokens are not either.
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
