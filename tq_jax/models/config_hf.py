"""`DecoderConfig` from and to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tq_jax.models.config import DecoderConfig
from tq_jax.models.families import FAMILIES
from tq_jax.models.fields import (
    COUNT,
    FLAG,
    POSITIVE,
    SIZE,
    TABLE,
    TEXT,
    check_fields,
    either,
    given,
    list_of,
    refuse,
    required,
)
from tq_jax.models.quantization import quantization_from_hf
from tq_jax.models.rope_hf import rope_from_hf, scaling_to_hf
from tq_jax.models.rules_hf import FULL, LOCAL, RULES, Rules

_STOP_KINDS = {"eos_token_id": either(COUNT, list_of(COUNT))}
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "moe_intermediate_size", "max_position_embeddings", "original_max_position_embeddings"),
    *("sliding_window", "sliding_window_pattern", "num_experts", "num_local_experts", "num_experts_per_tok"),
    "no_rope_layer_interval",
)
_KINDS = (
    dict.fromkeys(_SIZES, SIZE)
    | {
        "rms_norm_eps": POSITIVE,
        "rope_theta": POSITIVE,
        "rope_local_base_freq": POSITIVE,
        "partial_rotary_factor": POSITIVE,
        "query_pre_attn_scalar": POSITIVE,
        "attn_logit_softcapping": POSITIVE,
        "final_logit_softcapping": POSITIVE,
        "max_window_layers": COUNT,
        "use_sliding_window": FLAG,
        "tie_word_embeddings": FLAG,
        "norm_topk_prob": FLAG,
        "layer_types": list_of(TEXT),
        "no_rope_layers": list_of(COUNT),
        "rope_scaling": TABLE,
        "rope_parameters": TABLE,
        "quantization_config": TABLE,
    }
    | _STOP_KINDS
)


def config_from_hf(config: Mapping[str, Any], *, generation_config: Mapping[str, Any] | None = None) -> DecoderConfig:
    """Read a `DecoderConfig` from the contents of a Hugging Face `config.json`.

    Args:
        config: The parsed `config.json`.
        generation_config: The parsed `generation_config.json`. Its `eos_token_id` adds stop tokens.

    Returns:
        The config.

    Raises:
        NotImplementedError: For an unsupported model type, quantization, or option that changes the arithmetic.
        ValueError: If a required field is missing, holds a value of another kind, or contradicts another field.
    """
    check_fields("config.json", config, _KINDS)
    check_fields("generation_config.json", generation_config or {}, _STOP_KINDS)
    names = {family.hf_type: name for name, family in FAMILIES.items()}
    refuse("model_type", config.get("model_type"), tuple(names))
    architecture = names[config["model_type"]]
    rules = RULES[architecture]
    _refuse_options(config, rules)
    quantization_from_hf(config)
    num_heads, dim, num_layers = (
        required(config, name) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    defaults = {"num_key_value_heads": num_heads, "head_dim": dim // num_heads}
    num_kv_heads, head_dim = (
        required(config, name, default=None if name in rules.named else default) for name, default in defaults.items()
    )
    window, rope = _window(config, rules), rope_from_hf(config, rules)
    eos = [_as_tuple(source.get("eos_token_id")) for source in (config, generation_config or {})]
    return DecoderConfig(
        architecture=architecture,
        vocab_size=required(config, "vocab_size"),
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_dim=required(config, rules.ffn_dim),
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        rotary_dim=None if rope.share == 1 else int(head_dim * rope.share),
        no_rope_layers=_no_rope_layers(config, num_layers) if rules.no_rope else (),
        query_scalar=float(required(config, "query_pre_attn_scalar")) if rules.query_scalar else None,
        attention_softcap=_softcap(config, "attn_logit_softcapping", rules),
        final_softcap=_softcap(config, "final_logit_softcapping", rules),
        sliding_window=window,
        local_layers=_local_layers(config, rules, num_layers, window),
        local_rope_base=rope.local_base,
        **_experts(config, rules),
        norm_eps=float(required(config, "rms_norm_eps")),
        tied_head=bool(given(config, "tie_word_embeddings", rules.tied_head)),
        max_context=required(config, "max_position_embeddings"),
        stop_tokens=tuple(dict.fromkeys(eos[0] + eos[1])),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a decoder, as `config_from_hf` and transformers read it."""
    family, rules = FAMILIES[config.architecture], RULES[config.architecture]
    out = {
        "architectures": [family.hf_class],
        "model_type": family.hf_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling_to_hf(config.rope_scaling, max_context=config.max_context),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_context,
        "eos_token_id": list(config.stop_tokens),
        "hidden_activation" if rules.query_scalar else "hidden_act": rules.activations[0],
        **rules.only,
    }
    if rules.window != "none":
        out |= {"sliding_window": config.sliding_window}
    if rules.window == "flagged":
        out |= {"use_sliding_window": config.sliding_window is not None}
    if rules.layer_types:
        out |= {"layer_types": [FULL if window is None else LOCAL for window in config.layer_windows]}
    if rules.query_scalar:
        scalar = config.query_scalar or config.head_dim
        out |= {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar}
    if rules.softcaps:
        out |= {
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    if rules.local_rope:
        out |= {"rope_local_base_freq": config.local_rope_base or config.rope_base}
    if rules.partial_rope:
        out |= {"partial_rotary_factor": (config.rotary_dim or config.head_dim) / config.head_dim}
        if config.rope_scaling is not None:
            out |= {"original_max_position_embeddings": config.rope_scaling.original_context}
    if rules.no_rope:
        out |= {"no_rope_layers": [int(rotary) for rotary in config.layer_positions]}
    if rules.experts is not None:
        out |= {rules.experts: config.num_experts, "num_experts_per_tok": config.experts_per_token}
    if rules.ffn_dim != "intermediate_size":
        out |= {rules.ffn_dim: config.ffn_dim, "norm_topk_prob": config.normalized_experts}
    return out


def _refuse_options(config: Mapping[str, Any], rules: Rules) -> None:
    """Refuse options that change the arithmetic and that `Decoder` does not support."""
    for name in ("hidden_act", "hidden_activation"):
        refuse(name, given(config, name, rules.activations[0]), rules.activations)
    flags = dict.fromkeys(("attention_bias", "mlp_bias", "use_bidirectional_attention"), False)
    for name, value in (flags | dict(rules.only)).items():
        refuse(name, given(config, name, value), (value,))
    unset = [] if rules.softcaps else ["attn_logit_softcapping", "final_logit_softcapping"]
    unset += ["sliding_window"] if rules.window == "none" else []
    unset += [] if rules.layer_types else ["layer_types"]
    for name in unset:
        refuse(name, config.get(name), (None,))


def _window(config: Mapping[str, Any], rules: Rules) -> int | None:
    """Tokens that a query of a local layer sees; None if no layer is local."""
    if rules.window == "none":
        return None
    if rules.window == "flagged":
        return required(config, "sliding_window") if config.get("use_sliding_window") else None
    return _present(config, "sliding_window") if rules.window == "given" else config.get("sliding_window")


def _present(config: Mapping[str, Any], name: str) -> Any:
    """The value of a field that must be there, but may be null."""
    if name not in config:
        raise ValueError(f"config.json: expected the field {name!r}, got none")
    return config[name]


def _softcap(config: Mapping[str, Any], name: str, rules: Rules) -> float | None:
    value = _present(config, name) if rules.softcaps else None
    return None if value is None else float(value)


def _local_layers(config: Mapping[str, Any], rules: Rules, num_layers: int, window: int | None) -> tuple[bool, ...]:
    """Whether each layer is local; empty if all layers are alike."""
    types = config.get("layer_types")
    if types is not None:
        for kind in types:
            refuse("layer_types", kind, (FULL, LOCAL))
        return tuple(kind == LOCAL for kind in types)
    if window is None or not rules.layer_types:
        return ()
    if rules.no_rope:
        return _no_rope_layers(config, num_layers)
    if rules.pattern:
        pattern = given(config, "sliding_window_pattern", rules.pattern)
        return tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    first = required(config, "max_window_layers")
    return tuple(layer >= first for layer in range(num_layers))


def _no_rope_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Whether each layer leaves positions out; files say which layers have them."""
    layers = config.get("no_rope_layers")
    if layers is not None:
        return tuple(not rotary for rotary in layers[:num_layers])
    interval = given(config, "no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval == 0 for layer in range(num_layers))


def _experts(config: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """The fields of a decoder that say which experts there are."""
    if rules.experts is None:
        return {}
    # transformers 5 writes the number of experts of all families under one name.
    count = required(config, rules.experts, default=config.get("num_local_experts"))
    taken = required(config, "num_experts_per_tok")
    normalized = True if rules.ffn_dim == "intermediate_size" else bool(given(config, "norm_topk_prob", False))
    return {"num_experts": count, "experts_per_token": taken, "normalized_experts": normalized}


def _as_tuple(eos: int | list[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)
