"""`DecoderConfig` from GGUF metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tq_jax.models.config import DecoderConfig
from tq_jax.models.families import FAMILIES
from tq_jax.models.fields import COUNT, FLAG, POSITIVE, SIZE, TEXT, check_fields, either, list_of
from tq_jax.models.rope import RopeScaling, rotary_frequencies

_FIELDS = {
    "attention.head_count": SIZE,
    "attention.head_count_kv": SIZE,
    "attention.key_length": SIZE,
    "attention.layer_norm_rms_epsilon": POSITIVE,
    "attention.value_length": SIZE,
    "block_count": SIZE,
    "context_length": SIZE,
    "embedding_length": SIZE,
    "feed_forward_length": SIZE,
    "rope.dimension_count": SIZE,
    "rope.freq_base": POSITIVE,
    "rope.scaling.factor": POSITIVE,
    "rope.scaling.original_context_length": SIZE,
    "rope.scaling.type": TEXT,
    "rope.scaling.yarn_beta_fast": POSITIVE,
    "rope.scaling.yarn_beta_slow": POSITIVE,
    "vocab_size": SIZE,
}
_WINDOW = {
    "attention.sliding_window": SIZE,
    "attention.sliding_window_pattern": either(SIZE, list_of(FLAG)),
}
_EXPERTS = {
    "expert_count": COUNT,
    "expert_feed_forward_length": SIZE,
    "expert_used_count": COUNT,
}
_FAMILY_FIELDS = {
    "llama": _EXPERTS,
    "qwen3moe": _EXPERTS,
    "gpt-oss": _EXPERTS | _WINDOW,
    "phi3": {"attention.sliding_window": COUNT, "rope.scaling.attn_factor": POSITIVE},
    "gemma2": _WINDOW | {"attn_logit_softcapping": POSITIVE, "final_logit_softcapping": POSITIVE},
    "gemma3": _WINDOW | {"rope.freq_base_swa": POSITIVE},
}
"""Fields of some architectures, beside those of all."""
_STOP_FIELDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
# Tokens that end an answer in every model that has them: many files name one end only, or that of texts alone.
_STOP_TEXTS = (
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "<｜end▁of▁sentence｜>"),
)
TOKEN_FIELDS = {"tokenizer.ggml.tokens": list_of(TEXT)} | dict.fromkeys(_STOP_FIELDS, COUNT)
# Files of Gemma 3 do not hold the rotary base of local layers. Those of Gemma 2 and Gemma 3 do not hold the query
# scalar, which is head_dim except in the 27B models, known by their layers: there it is dim / num_heads.
_GEMMA_27B_LAYERS, _GEMMA3_LOCAL_BASE = {"gemma2": 46, "gemma3": 62}, 10000.0
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gpt_oss": 2}
"""Of so many layers the last one sees all tokens."""
_NO_ROPE_INTERVAL = 4
"""Of so many layers of SmolLM3 the last one has no positions."""


def config_from_gguf(
    metadata: Mapping[str, Any],
    *,
    tied_head: bool,
    rope_factors: np.ndarray | None = None,
    longrope_factors: tuple[np.ndarray, np.ndarray] | None = None,
) -> DecoderConfig:
    """Read a `DecoderConfig` from GGUF metadata.

    Args:
        metadata: Name to value, as `gguf_file.read_gguf` returns it.
        tied_head: Whether the file has no tensor `output.weight`.
        rope_factors: float32 [head_dim / 2], divisors of the rotary frequencies: the tensor `rope_freqs.weight`, None
            if the file has none.
        longrope_factors: float32 [rotary channels / 2] each, those for long and for short contexts: the tensors
            `rope_factors_long.weight` and `rope_factors_short.weight`, None if the file has none.

    Returns:
        The config.

    Raises:
        NotImplementedError: For an unsupported architecture, or an unsupported field that changes the arithmetic.
        ValueError: If a required field is missing or a field holds a value of another kind.
    """
    architecture, prefix, fields = _fields(metadata)

    def required(name: str) -> Any:
        return _required(prefix, fields, name)

    num_heads, dim, num_layers = (
        required(name) for name in ("attention.head_count", "embedding_length", "block_count")
    )
    head_dim = fields.get("attention.key_length", dim // num_heads)
    rotary_dim = fields.get("rope.dimension_count", head_dim)
    partial = {"rotary_dim": rotary_dim} if architecture == "phi3" and rotary_dim < head_dim else {}
    for name in ("attention.value_length", *([] if partial else ["rope.dimension_count"])):
        if fields.get(name, head_dim) != head_dim:
            raise NotImplementedError(f"GGUF field {prefix}{name}={fields[name]}: supported is head_dim={head_dim}")
    base, context = float(fields.get("rope.freq_base", 10000.0)), required("context_length")
    experts = fields.get("expert_count", 0)
    if longrope_factors is None:
        scaling = _scaling(architecture, prefix, fields, rope_factors, head_dim=rotary_dim, base=base)
    else:
        scaling = _longrope(prefix, fields, *longrope_factors, context=context)
    config = DecoderConfig(
        architecture=architecture,
        vocab_size=fields.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_dim=fields.get("expert_feed_forward_length") or required("feed_forward_length"),
        rope_base=base,
        rope_scaling=scaling,
        num_experts=experts,
        experts_per_token=required("expert_used_count") if experts else 0,
        norm_eps=float(required("attention.layer_norm_rms_epsilon")),
        tied_head=tied_head,
        max_context=context,
        stop_tokens=_stop_tokens(metadata),
        **partial,
    )
    return dataclasses.replace(config, **_family_options(config, prefix, fields))


def _fields(metadata: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """The family's name, the prefix of its fields, and its fields without the prefix."""
    names = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}
    architecture = names.get(str(metadata.get("general.architecture")))
    if architecture is None:
        raise NotImplementedError(
            f"GGUF architecture {metadata.get('general.architecture')!r}: supported are {sorted(names)}"
        )
    name = str(FAMILIES[architecture].gguf)
    prefix = f"{name}."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    supported = _FIELDS | _FAMILY_FIELDS.get(name, {})
    for name in sorted(fields.keys() - supported):
        raise NotImplementedError(f"GGUF field {prefix}{name}={fields[name]!r}: supported are {sorted(supported)}")
    check_fields("GGUF metadata", metadata, {prefix + name: kind for name, kind in supported.items()} | TOKEN_FIELDS)
    # Files of Mixtral are those of Llama with experts.
    return "mixtral" if architecture == "llama" and fields.get("expert_count") else architecture, prefix, fields


def _required(prefix: str, fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"GGUF metadata: expected the field {prefix}{name}, got none")
    return fields[name]


def _family_options(config: DecoderConfig, prefix: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that only some families have: local layers, positions, scales and soft-caps."""
    name, out = config.architecture, {}
    if name == "smollm3":
        return {"no_rope_layers": tuple((layer + 1) % _NO_ROPE_INTERVAL == 0 for layer in range(config.num_layers))}
    if name == "phi3":
        return {"sliding_window": fields.get("attention.sliding_window") or None}
    if name in _PATTERNS:
        pattern = fields.get("attention.sliding_window_pattern", _PATTERNS[name])
        if not isinstance(pattern, list):
            pattern = [(layer + 1) % pattern != 0 for layer in range(config.num_layers)]
        out |= {
            "sliding_window": _required(prefix, fields, "attention.sliding_window"),
            "local_layers": tuple(bool(local) for local in pattern),
        }
    if name in _GEMMA_27B_LAYERS:
        largest = config.num_layers == _GEMMA_27B_LAYERS[name]
        out |= {"query_scalar": config.dim / config.num_heads if largest else float(config.head_dim)}
    if name == "gemma2":
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        attention, final = (float(_required(prefix, fields, cap)) for cap in caps)
        out |= {"attention_softcap": attention, "final_softcap": final}
    if name == "gemma3":
        out |= {"local_rope_base": float(fields.get("rope.freq_base_swa", _GEMMA3_LOCAL_BASE))}
    return out


def _stop_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of all tokens that end a generation, without repetitions: fields, then those known by their texts."""
    stop = [metadata[key] for key in _STOP_FIELDS if key in metadata]
    ids = {token: index for index, token in enumerate(metadata.get("tokenizer.ggml.tokens", ()))}
    return tuple(dict.fromkeys([*stop, *(ids[text] for text in _STOP_TEXTS if text in ids)]))


def _scaling(
    architecture: str,
    prefix: str,
    fields: Mapping[str, Any],
    factors: np.ndarray | None,
    *,
    head_dim: int,
    base: float,
) -> RopeScaling | None:
    """The scaling of the rotary frequencies, from the metadata or from the divisors."""
    kind = fields.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise NotImplementedError(
            f"GGUF field {prefix}rope.scaling.type={kind!r}: supported is 'none' or 'linear' or 'yarn'"
        )
    if kind == "none":
        return None if factors is None else llama3_scaling(factors, head_dim=head_dim, base=base)
    if factors is not None:
        raise NotImplementedError(
            f"GGUF tensor 'rope_freqs.weight' beside rope.scaling.type={kind!r}: supported is one of them"
        )
    factor = float(_required(prefix, fields, "rope.scaling.factor"))
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=_required(prefix, fields, "rope.scaling.original_context_length"),
        beta_fast=float(fields.get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(fields.get("rope.scaling.yarn_beta_slow", 1.0)),
        whole_pairs=architecture != "gpt_oss",
    )


def _longrope(
    prefix: str, fields: Mapping[str, Any], long: np.ndarray, short: np.ndarray, *, context: int
) -> RopeScaling:
    """The scaling of a Phi-3 file with divisors for long and for short contexts."""
    original, length = _required(prefix, fields, "rope.scaling.original_context_length"), "rope.scaling.attn_factor"
    return RopeScaling(
        kind="longrope",
        factor=max(context / original, 1.0),
        original_context=original,
        attention_factor=float(fields[length]) if length in fields else None,
        divisors=tuple(map(float, long)),
        short_divisors=tuple(map(float, short)),
    )


def llama3_scaling(factors: np.ndarray, *, head_dim: int, base: float) -> RopeScaling | None:
    """The scaling that divides each rotary frequency by its factor.

    Files of Llama 3 store the divisors instead of the rule that gives them.

    Args:
        factors: float32 [head_dim / 2], one divisor per channel pair.
        head_dim: Channels of one head.
        base: Base of the rotary frequencies.

    Returns:
        The scaling; None if every factor is 1.

    Raises:
        NotImplementedError: If Llama 3's rule with its usual constants does not give these factors.

    Example:
        >>> llama3_scaling(np.ones(4, np.float32), head_dim=8, base=5e5) is None
        True
    """
    factors = np.asarray(factors, np.float32)
    if np.all(factors == 1):
        return None
    if factors.shape == (head_dim // 2,) and factors.max() > 1:
        found = RopeScaling(kind="llama3", factor=float(factors.max()))
        options = {"head_dim": head_dim, "base": base}
        divisors = rotary_frequencies(**options) / rotary_frequencies(**options, scaling=found)
        if np.allclose(divisors, factors, rtol=1e-4):
            return found
    raise NotImplementedError(
        f"GGUF tensor 'rope_freqs.weight' of {factors.size} factors up to {factors.max():g}: supported is Llama 3's "
        "rule (low 1, high 4, original context 8192)"
    )
