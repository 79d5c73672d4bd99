"""Rotary frequencies from and to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tq_jax.models.fields import FLAG, NUMBER, POSITIVE, SIZE, TABLE, check_fields, given, list_of, refuse, required
from tq_jax.models.rope import RopeScaling
from tq_jax.models.rules_hf import FULL, LOCAL, Rules

_KINDS = {
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": SIZE,
    "partial_rotary_factor": POSITIVE,
    "attention_factor": POSITIVE,
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "truncate": FLAG,
    "short_factor": list_of(NUMBER),
    "long_factor": list_of(NUMBER),
}
_COMMON = {
    *("rope_type", "type", "partial_rotary_factor", "rope_theta", "factor"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_FIELDS = {
    "default": _COMMON,
    "linear": _COMMON,
    "llama3": _COMMON,
    "yarn": _COMMON | {"attention_factor", "beta_fast", "beta_slow", "truncate"},
    "longrope": _COMMON | {"attention_factor", "short_factor", "long_factor"},
}


@dataclass(frozen=True)
class Rope:
    """The rotary frequencies of a decoder.

    Attributes:
        base: See `DecoderConfig.rope_base`.
        scaling: See `DecoderConfig.rope_scaling`.
        local_base: See `DecoderConfig.local_rope_base`.
        share: Share of a head's channels that turn.
    """

    base: float
    scaling: RopeScaling | None
    local_base: float | None
    share: float


def rope_from_hf(config: Mapping[str, Any], rules: Rules) -> Rope:
    """Read the rotary frequencies.

    Args:
        config: The parsed `config.json`.
        rules: The rules of its family.

    Raises:
        NotImplementedError: For an unsupported kind of scaling, or an unsupported option that changes the arithmetic.
        ValueError: If a required field is missing or holds a value of another kind.
    """
    # transformers 5 keeps base and scaling in rope_parameters. Older versions have the fields rope_theta and
    # rope_scaling.
    parameters = dict(config.get("rope_parameters") or {})
    check_fields("config.json rope_parameters", parameters, {LOCAL: TABLE, FULL: TABLE})
    local = parameters.pop(LOCAL, None) or {}
    parameters |= parameters.pop(FULL, None) or {}
    parameters |= config.get("rope_scaling") or {}
    for each in (parameters, local):
        check_fields("config.json rope_parameters", each, _KINDS)
    base = required(parameters, "rope_theta", default=given(config, "rope_theta", rules.rope_base))
    share = given(parameters, "partial_rotary_factor", given(config, "partial_rotary_factor", 1.0))
    if not rules.partial_rope:
        refuse("partial_rotary_factor", share, (1.0,))
    if not rules.local_rope and local:
        raise NotImplementedError(f"config.json rope_parameters {LOCAL}={local!r}: supported is one for all layers")
    refuse(f"rope_type of {LOCAL}", local.get("rope_type", "default"), ("default",))
    local_base = given(local, "rope_theta", given(config, "rope_local_base_freq", 1e4)) if rules.local_rope else None
    scaling = _scaling(config, parameters, renamed=rules.partial_rope)
    return Rope(float(base), scaling, None if local_base is None else float(local_base), float(share))


def _scaling(config: Mapping[str, Any], parameters: Mapping[str, Any], *, renamed: bool) -> RopeScaling | None:
    """The scaling of the rotary frequencies; `renamed` if older names of "longrope" are in use."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = "longrope" if renamed and kind in ("su", "yarn") else kind
    refuse("rope_type", kind, tuple(_FIELDS) if renamed else tuple(kind for kind in _FIELDS if kind != "longrope"))
    for name in sorted(parameters.keys() - _FIELDS[kind]):
        raise NotImplementedError(
            f"config.json rope_parameters {name}={parameters[name]!r}: supported are {sorted(_FIELDS[kind])}"
        )
    if kind == "default":
        return None
    if kind == "longrope":
        return _longrope(config, parameters)
    factor = float(required(parameters, "factor"))
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    original = required(parameters, "original_max_position_embeddings")
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=factor,
            low_freq_factor=float(required(parameters, "low_freq_factor")),
            high_freq_factor=float(required(parameters, "high_freq_factor")),
            original_context=original,
        )
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=float(given(parameters, "beta_fast", 32.0)),
        beta_slow=float(given(parameters, "beta_slow", 1.0)),
        whole_pairs=bool(given(parameters, "truncate", True)),
        attention_factor=_attention_factor(parameters),
    )


def _longrope(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> RopeScaling:
    """The scaling of a Phi-3 model; its original context may stand beside the other sizes."""
    name = "original_max_position_embeddings"
    original = required(parameters, name, default=config.get(name))
    return RopeScaling(
        kind="longrope",
        factor=float(given(parameters, "factor", _stretched(required(config, "max_position_embeddings"), original))),
        original_context=original,
        attention_factor=_attention_factor(parameters),
        divisors=tuple(map(float, required(parameters, "long_factor"))),
        short_divisors=tuple(map(float, required(parameters, "short_factor"))),
    )


def _stretched(context: int, original: int) -> float:
    """How much longer a context is than the original one."""
    return max(context / original, 1.0)


def _attention_factor(parameters: Mapping[str, Any]) -> float | None:
    factor = parameters.get("attention_factor")
    return None if factor is None else float(factor)


def scaling_to_hf(scaling: RopeScaling | None, *, max_context: int) -> dict[str, Any] | None:
    """The scaling as the field `rope_scaling`, of a decoder of a context."""
    if scaling is None:
        return None
    out: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind != "longrope" or scaling.factor != _stretched(max_context, scaling.original_context):
        out |= {"factor": scaling.factor}
    if scaling.kind == "linear":
        return out
    out |= {"original_max_position_embeddings": scaling.original_context}
    if scaling.kind == "llama3":
        return out | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.attention_factor is not None:
        out |= {"attention_factor": scaling.attention_factor}
    if scaling.kind == "longrope":
        return out | {"long_factor": list(scaling.divisors), "short_factor": list(scaling.short_divisors)}
    return out | {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.whole_pairs}
