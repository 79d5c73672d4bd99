"""What a decoder's shape is, read from GGUF metadata or from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_GGUF_FIELDS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    }
)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Static description of a decoder: hashable, so that it can be part of a compiled function's key.

    Attributes:
        architecture: family name, one of ``families.FAMILIES``.
        vocab_size: rows of the token embedding.
        dim: width of the residual stream.
        num_layers: decoder blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: channels of one head; even.
        ffn_dim: width of the feed-forward block.
        rope_base: base of the rotary frequencies.
        norm_eps: epsilon of every RMS norm.
        tied_head: the output head is the transposed token embedding.
        max_context: tokens the model was trained to attend over.
        stop_tokens: token ids that end a generation.

    Raises:
        ValueError: a size is not positive, or the sizes contradict each other.

    Example:
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48)
        >>> config.rope_base
        10000.0
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    max_context: int = 2048
    stop_tokens: tuple[int, ...] = ()
    architecture: str = "llama"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "max_context")
        for name in (*sizes, "rope_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary positions, got {self.head_dim}")
        for token in self.stop_tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"stop_tokens: expected ids in [0, {self.vocab_size}), got {token}")


def config_from_gguf(metadata: Mapping[str, Any], *, tied_head: bool) -> DecoderConfig:
    """Read a `DecoderConfig` from GGUF metadata.

    Args:
        metadata: key to value, as `gguf_file.read_gguf` returns it.
        tied_head: whether the file has no ``output.weight``.

    Raises:
        NotImplementedError: another architecture, or a field of this one that changes the arithmetic.
        ValueError: a required field is missing.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise NotImplementedError(f"GGUF architecture {architecture!r}: supported is 'llama'")
    prefix = f"{architecture}."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for name in sorted(fields.keys() - _GGUF_FIELDS):
        raise NotImplementedError(f"GGUF field {prefix}{name}={fields[name]!r}: supported are {sorted(_GGUF_FIELDS)}")

    def required(name: str) -> Any:
        if name not in fields:
            raise ValueError(f"GGUF metadata: expected the field {prefix}{name}, got none")
        return fields[name]

    num_heads, dim = required("attention.head_count"), required("embedding_length")
    head_dim = fields.get("attention.key_length", dim // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.get(name, head_dim) != head_dim:
            raise NotImplementedError(f"GGUF field {prefix}{name}={fields[name]}: supported is head_dim={head_dim}")
    stop = [metadata[key] for key in _GGUF_STOP_FIELDS if key in metadata]
    return DecoderConfig(
        architecture=architecture,
        vocab_size=fields.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        dim=dim,
        num_layers=required("block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_dim=required("feed_forward_length"),
        rope_base=float(fields.get("rope.freq_base", 10000.0)),
        norm_eps=float(required("attention.layer_norm_rms_epsilon")),
        tied_head=tied_head,
        max_context=required("context_length"),
        stop_tokens=tuple(dict.fromkeys(stop)),
    )


_GGUF_STOP_FIELDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def config_from_hf(config: Mapping[str, Any], *, generation_config: Mapping[str, Any] | None = None) -> DecoderConfig:
    """Read a `DecoderConfig` from the contents of a Hugging Face ``config.json``.

    Args:
        config: the parsed ``config.json``.
        generation_config: the parsed ``generation_config.json``; its ``eos_token_id`` ends generations too.

    Raises:
        NotImplementedError: another model type, or an option that changes the arithmetic.
        ValueError: a required field is missing.
    """
    _refuse_hf(config)

    def required(name: str) -> Any:
        if config.get(name) is None:
            raise ValueError(f"config.json: expected the field {name!r}, got none")
        return config[name]

    num_heads, dim = required("num_attention_heads"), required("hidden_size")
    # transformers 5 keeps the base inside rope_parameters, older versions beside it.
    rope = config.get("rope_parameters") or {}
    eos = [_as_tuple(source.get("eos_token_id")) for source in (config, generation_config or {})]
    return DecoderConfig(
        architecture=config["model_type"],
        vocab_size=required("vocab_size"),
        dim=dim,
        num_layers=required("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or dim // num_heads,
        ffn_dim=required("intermediate_size"),
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        norm_eps=float(required("rms_norm_eps")),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        max_context=required("max_position_embeddings"),
        stop_tokens=tuple(dict.fromkeys(eos[0] + eos[1])),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The ``config.json`` that `config_from_hf` reads back as ``config``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_context,
        "eos_token_id": list(config.stop_tokens),
    }


def _refuse_hf(config: Mapping[str, Any]) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    supported = {
        "model_type": (config.get("model_type"), ("llama",)),
        "hidden_act": (config.get("hidden_act", "silu"), ("silu", "swish")),
        "attention_bias": (config.get("attention_bias", False), (False,)),
        "mlp_bias": (config.get("mlp_bias", False), (False,)),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), ("default",)),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0,
            (1.0,),
        ),
        "quantization_config": (config.get("quantization_config"), (None,)),
        "sliding_window": (config.get("sliding_window"), (None,)),
    }
    for name, (value, allowed) in supported.items():
        if value not in allowed:
            raise NotImplementedError(f"config.json {name}={value!r}: supported is {' or '.join(map(repr, allowed))}")


def _as_tuple(eos: int | list[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)
