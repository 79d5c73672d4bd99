"""How the fields of a Hugging Face `config.json` are to be read, by family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LOCAL, FULL = "sliding_attention", "full_attention"
_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the fields of a family mean.

    Attributes:
        activations: Supported activations; the first one is that of files that name none.
        named: Fields that files must name, although other families have a default: its model class has a constant.
        window: "none" if `sliding_window` is not supported, "flagged" if it counts where `use_sliding_window` is true,
            "given" if it always counts, and "optional" if it may be missing.
        layer_types: Whether a file may say which layers are local; if not, all are where there is a window.
        pattern: Of so many layers the last one sees all tokens, in files that do not say which layers are local; 0 for
            local layers from `max_window_layers` on.
        rope_base: Base of the rotary frequencies of files that name none; None if files must have them.
        local_rope: Whether local layers have their own rotary frequencies.
        partial_rope: Whether only a part of a head's channels may turn.
        no_rope: Whether some layers have no positions.
        tied_head: Value of `tie_word_embeddings` in files that lack it.
        query_scalar: Whether `query_pre_attn_scalar` scales the attention scores.
        softcaps: Whether attention scores and logits may have soft-caps.
        experts: Field that holds the number of experts; None if there are none.
        ffn_dim: Field that holds the width of the feed-forward block.
        only: Fields that change the arithmetic, with the supported value, which is also that of files without them.
    """

    activations: tuple[str, ...] = _SILU
    named: tuple[str, ...] = ("num_key_value_heads",)
    window: Literal["none", "flagged", "given", "optional"] = "none"
    layer_types: bool = False
    pattern: int = 0
    rope_base: float | None = 1e4
    local_rope: bool = False
    partial_rope: bool = False
    no_rope: bool = False
    tied_head: bool = False
    query_scalar: bool = False
    softcaps: bool = False
    experts: str | None = None
    ffn_dim: str = "intermediate_size"
    only: Mapping[str, Any] = field(default_factory=dict)


_NAMED_HEADS = ("num_key_value_heads", "head_dim")
_QWEN = {"window": "flagged", "layer_types": True}
_GEMMA: dict[str, Any] = {
    "activations": _GELU,
    "named": _NAMED_HEADS,
    "window": "given",
    "layer_types": True,
    "tied_head": True,
    "query_scalar": True,
}
RULES: Mapping[str, Rules] = {
    "llama": Rules(named=()),
    "mistral": Rules(window="given"),
    "mixtral": Rules(window="optional", rope_base=1e6, experts="num_local_experts"),
    "smollm3": Rules(**_QWEN, rope_base=2e6, no_rope=True, tied_head=True),
    "phi3": Rules(named=(), window="optional", partial_rope=True),
    "qwen2": Rules(**_QWEN),
    "qwen3": Rules(**_QWEN, named=_NAMED_HEADS),
    "qwen3_moe": Rules(
        window="flagged",
        experts="num_experts",
        ffn_dim="moe_intermediate_size",
        only={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmo2": Rules(named=()),
    "gemma2": Rules(**_GEMMA, pattern=2, softcaps=True),
    "gemma3": Rules(**_GEMMA, pattern=6, rope_base=1e6, local_rope=True),
    "gpt_oss": Rules(
        named=_NAMED_HEADS,
        window="given",
        layer_types=True,
        pattern=2,
        rope_base=None,
        experts="num_local_experts",
        only={"attention_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    ),
}
