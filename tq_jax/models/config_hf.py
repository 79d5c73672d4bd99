"""`DecoderConfig` from and to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tq_jax.models.config import DecoderConfig
from tq_jax.models.families import FAMILIES
from tq_jax.models.fields import COUNT, FLAG, POSITIVE, SIZE, TABLE, TEXT, check_fields, either, list_of
from tq_jax.models.rope import RopeScaling

_LOCAL, _FULL = "sliding_attention", "full_attention"
_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
_STOP_KINDS = {"eos_token_id": either(COUNT, list_of(COUNT))}
_KINDS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "intermediate_size": SIZE,
    "max_position_embeddings": SIZE,
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "rope_local_base_freq": POSITIVE,
    "query_pre_attn_scalar": POSITIVE,
    "sliding_window": SIZE,
    "sliding_window_pattern": SIZE,
    "max_window_layers": COUNT,
    "use_sliding_window": FLAG,
    "tie_word_embeddings": FLAG,
    "layer_types": list_of(TEXT),
    "rope_scaling": TABLE,
    "rope_parameters": TABLE,
} | _STOP_KINDS
_ROPE_KINDS = {
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": SIZE,
}
_ROPE_FIELDS = {"rope_type", "type", "partial_rotary_factor", *_ROPE_KINDS}


def config_from_hf(config: Mapping[str, Any], *, generation_config: Mapping[str, Any] | None = None) -> DecoderConfig:
    """Read a `DecoderConfig` from the contents of a Hugging Face `config.json`.

    Args:
        config: The parsed `config.json`.
        generation_config: The parsed `generation_config.json`. Its `eos_token_id` adds stop tokens.

    Returns:
        The config.

    Raises:
        NotImplementedError: For an unsupported model type, or an unsupported option that changes the arithmetic.
        ValueError: If a required field is missing, holds a value of another kind, or contradicts another field.
    """
    check_fields("config.json", config, _KINDS)
    check_fields("generation_config.json", generation_config or {}, _STOP_KINDS)
    names = {family.hf_type: name for name, family in FAMILIES.items()}
    _refuse("model_type", config.get("model_type"), tuple(names))
    architecture = names[config["model_type"]]
    _refuse_options(config, architecture)
    num_heads, dim, num_layers = (
        _required(config, name) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    # Model classes whose default is a constant must name the field: num_key_value_heads for all but Llama, and head_dim
    # for Qwen 3 and Gemma 3.
    num_kv_heads = _required(config, "num_key_value_heads", default=num_heads if architecture == "llama" else None)
    head_dim = _required(config, "head_dim", default=None if architecture in ("qwen3", "gemma3") else dim // num_heads)
    window = _window(config, architecture)
    base, scaling, local_base = _rope(config, architecture)
    eos = [_as_tuple(source.get("eos_token_id")) for source in (config, generation_config or {})]
    return DecoderConfig(
        architecture=architecture,
        vocab_size=_required(config, "vocab_size"),
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_dim=_required(config, "intermediate_size"),
        rope_base=base,
        rope_scaling=scaling,
        query_scalar=float(_required(config, "query_pre_attn_scalar")) if architecture == "gemma3" else None,
        sliding_window=window,
        local_layers=_local_layers(config, architecture, num_layers, window),
        local_rope_base=local_base,
        norm_eps=float(_required(config, "rms_norm_eps")),
        tied_head=bool(_given(config, "tie_word_embeddings", architecture == "gemma3")),
        max_context=_required(config, "max_position_embeddings"),
        stop_tokens=tuple(dict.fromkeys(eos[0] + eos[1])),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a decoder, as `config_from_hf` and transformers read it."""
    family = FAMILIES[config.architecture]
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
        "rope_scaling": _scaling_to_hf(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_context,
        "eos_token_id": list(config.stop_tokens),
    }
    layers = [_FULL if window is None else _LOCAL for window in config.layer_windows]
    if config.architecture == "gemma3":
        scalar = config.query_scalar or config.head_dim
        return out | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "sliding_window": config.sliding_window,
            "layer_types": layers,
            "rope_local_base_freq": config.local_rope_base or config.rope_base,
        }
    out |= {"hidden_act": "silu"}
    if config.architecture == "llama":
        return out
    out |= {"sliding_window": config.sliding_window}
    if config.architecture == "mistral":
        return out
    return out | {"use_sliding_window": config.sliding_window is not None, "layer_types": layers}


def _required(config: Mapping[str, Any], name: str, *, default: Any = None) -> Any:
    """The value of a field, or its default; a field without either is an error."""
    value = _given(config, name, default)
    if value is None:
        raise ValueError(f"config.json: expected the field {name!r}, got none")
    return value


def _given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of a field; the default if it is missing or null."""
    return default if config.get(name) is None else config[name]


def _refuse(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse values that are not allowed."""
    if value not in allowed:
        raise NotImplementedError(f"config.json {name}={value!r}: supported is {' or '.join(map(repr, allowed))}")


def _refuse_options(config: Mapping[str, Any], architecture: str) -> None:
    """Refuse options that change the arithmetic and that `Decoder` does not support."""
    gemma = architecture == "gemma3"
    activations = _GELU if gemma else _SILU
    for name in ("hidden_act", "hidden_activation"):
        _refuse(name, _given(config, name, activations[0]), activations)
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        _refuse(name, _given(config, name, False), (False,))
    for name in ("quantization_config", "attn_logit_softcapping", "final_logit_softcapping"):
        _refuse(name, config.get(name), (None,))
    if architecture == "llama":
        _refuse("sliding_window", config.get("sliding_window"), (None,))
    if architecture in ("llama", "mistral"):
        _refuse("layer_types", config.get("layer_types"), (None,))


def _window(config: Mapping[str, Any], architecture: str) -> int | None:
    """Tokens that a query of a local layer sees; None if no layer is local."""
    if architecture == "llama":
        return None
    if architecture in ("qwen2", "qwen3"):
        return _required(config, "sliding_window") if config.get("use_sliding_window") else None
    if "sliding_window" not in config:
        raise ValueError("config.json: expected the field 'sliding_window', got none")
    return config["sliding_window"]


def _local_layers(
    config: Mapping[str, Any], architecture: str, num_layers: int, window: int | None
) -> tuple[bool, ...]:
    """Whether each layer is local; empty if all layers are alike."""
    types = config.get("layer_types")
    if types is not None:
        for kind in types:
            _refuse("layer_types", kind, (_FULL, _LOCAL))
        return tuple(kind == _LOCAL for kind in types)
    if window is None or architecture == "mistral":
        return ()
    if architecture == "gemma3":
        pattern = _given(config, "sliding_window_pattern", 6)
        return tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    first = _required(config, "max_window_layers")
    return tuple(layer >= first for layer in range(num_layers))


def _rope(config: Mapping[str, Any], architecture: str) -> tuple[float, RopeScaling | None, float | None]:
    """Base and scaling of the rotary frequencies, and the base of local layers if they have their own."""
    # transformers 5 keeps base and scaling in rope_parameters. Older versions have the fields rope_theta and
    # rope_scaling.
    parameters = dict(config.get("rope_parameters") or {})
    check_fields("config.json rope_parameters", parameters, {_LOCAL: TABLE, _FULL: TABLE})
    local = parameters.pop(_LOCAL, None) or {}
    parameters |= parameters.pop(_FULL, None) or {}
    parameters |= config.get("rope_scaling") or {}
    for each in (parameters, local):
        check_fields("config.json rope_parameters", each, _ROPE_KINDS)
    gemma = architecture == "gemma3"
    base = _given(parameters, "rope_theta", _given(config, "rope_theta", 1e6 if gemma else 1e4))
    partial = _given(parameters, "partial_rotary_factor", _given(config, "partial_rotary_factor", 1.0))
    _refuse("partial_rotary_factor", partial, (1.0,))
    if not gemma and local:
        raise NotImplementedError(f"config.json rope_parameters {_LOCAL}={local!r}: supported is one for all layers")
    _refuse(f"rope_type of {_LOCAL}", local.get("rope_type", "default"), ("default",))
    local_base = _given(local, "rope_theta", _given(config, "rope_local_base_freq", 1e4)) if gemma else None
    return float(base), _scaling(parameters), None if local_base is None else float(local_base)


def _scaling(parameters: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling of the rotary frequencies."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    _refuse("rope_type", kind, ("default", "linear", "llama3"))
    for name in sorted(parameters.keys() - _ROPE_FIELDS):
        raise NotImplementedError(
            f"config.json rope_parameters {name}={parameters[name]!r}: supported are {sorted(_ROPE_FIELDS)}"
        )
    if kind == "default":
        return None
    factor = float(_required(parameters, "factor"))
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=float(_required(parameters, "low_freq_factor")),
        high_freq_factor=float(_required(parameters, "high_freq_factor")),
        original_context=_required(parameters, "original_max_position_embeddings"),
    )


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The scaling as the field `rope_scaling`."""
    if scaling is None:
        return None
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return out
    return out | {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _as_tuple(eos: int | list[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)
