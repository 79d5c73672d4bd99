"""The decoder families: which layer class each runs and what its tensors are called in files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tq_jax.models.blocks import Block, Gemma3Block, Qwen2Block, Qwen3Block

LAYER = "{layer}"
GgufLayout = Literal["plain", "rope_pairs", "plus_one"]


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a family.

    Attributes:
        path: the decoder parameter it fills, dotted; below ``blocks`` one file tensor per layer.
        hf: its name in a Hugging Face checkpoint.
        gguf: its name in a GGUF file.
        gguf_layout: "rope_pairs" if GGUF stores its rows permuted for interleaved rotary positions, "plus_one" if it
            stores one more.
    """

    path: str
    hf: str
    gguf: str
    gguf_layout: GgufLayout = "plain"

    @property
    def per_layer(self) -> bool:
        """Whether the file has one such tensor for every layer."""
        return LAYER in self.hf


@dataclass(frozen=True)
class Family:
    """A decoder architecture.

    Attributes:
        block: its layer class.
        hf_type: ``model_type`` of its ``config.json``.
        hf_class: class that transformers loads it with.
        gguf: ``general.architecture`` of its GGUF files; None if they name another family.
        tensors: all parameters but an untied head.
        scaled_embedding: whether token embeddings are multiplied by sqrt(dim).
        end_of_turn: token that ends an answer where files do not say so.
        hf_buffers: endings of Hugging Face tensor names that hold constants, not parameters.
        head: the output head, absent from files of tied models.
    """

    block: type[Block]
    hf_type: str
    hf_class: str
    gguf: str | None
    tensors: tuple[Tensor, ...]
    scaled_embedding: bool = False
    end_of_turn: str | None = None
    hf_buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    head: Tensor = Tensor("head.kernel", "lm_head.weight", "output.weight")


def _layer(
    path: str, hf: str, gguf: str, layout: GgufLayout = "plain", *, kind: Literal["weight", "bias"] = "weight"
) -> Tensor:
    return Tensor(f"blocks.{path}", f"model.layers.{LAYER}.{hf}.{kind}", f"blk.{LAYER}.{gguf}.{kind}", layout)


def _common(*, projections: GgufLayout = "plain", norms: GgufLayout = "plain") -> tuple[Tensor, ...]:
    """What every family has, but for the norm before the feed-forward block."""
    return (
        Tensor("embedding.embedding", "model.embed_tokens.weight", "token_embd.weight"),
        _layer("attention_norm.scale", "input_layernorm", "attn_norm", norms),
        _layer("attention.query.kernel", "self_attn.q_proj", "attn_q", projections),
        _layer("attention.key.kernel", "self_attn.k_proj", "attn_k", projections),
        _layer("attention.value.kernel", "self_attn.v_proj", "attn_v"),
        _layer("attention.output.kernel", "self_attn.o_proj", "attn_output"),
        _layer("mlp.gate.kernel", "mlp.gate_proj", "ffn_gate"),
        _layer("mlp.up.kernel", "mlp.up_proj", "ffn_up"),
        _layer("mlp.down.kernel", "mlp.down_proj", "ffn_down"),
        Tensor("norm.scale", "model.norm.weight", "output_norm.weight", norms),
    )


def _head_norms(layout: GgufLayout = "plain") -> tuple[Tensor, ...]:
    return (
        _layer("attention.query_norm.scale", "self_attn.q_norm", "attn_q_norm", layout),
        _layer("attention.key_norm.scale", "self_attn.k_norm", "attn_k_norm", layout),
    )


_MLP_NORM = _layer("mlp_norm.scale", "post_attention_layernorm", "ffn_norm")
_BIASES = tuple(
    _layer(f"attention.{part}.bias", f"self_attn.{part[0]}_proj", f"attn_{part[0]}", kind="bias")
    for part in ("query", "key", "value")
)
_SANDWICH = (
    _layer("attention_post_norm.scale", "post_attention_layernorm", "post_attention_norm", "plus_one"),
    _layer("mlp_norm.scale", "pre_feedforward_layernorm", "ffn_norm", "plus_one"),
    _layer("mlp_post_norm.scale", "post_feedforward_layernorm", "post_ffw_norm", "plus_one"),
)

FAMILIES = {
    "llama": Family(
        block=Block,
        hf_type="llama",
        hf_class="LlamaForCausalLM",
        gguf="llama",
        tensors=(*_common(projections="rope_pairs"), _MLP_NORM),
    ),
    # GGUF files of Mistral models say "llama".
    "mistral": Family(
        block=Block,
        hf_type="mistral",
        hf_class="MistralForCausalLM",
        gguf=None,
        tensors=(*_common(projections="rope_pairs"), _MLP_NORM),
    ),
    "qwen2": Family(
        block=Qwen2Block,
        hf_type="qwen2",
        hf_class="Qwen2ForCausalLM",
        gguf="qwen2",
        tensors=(*_common(), *_BIASES, _MLP_NORM),
    ),
    "qwen3": Family(
        block=Qwen3Block,
        hf_type="qwen3",
        hf_class="Qwen3ForCausalLM",
        gguf="qwen3",
        tensors=(*_common(), *_head_norms(), _MLP_NORM),
    ),
    "gemma3": Family(
        block=Gemma3Block,
        hf_type="gemma3_text",
        hf_class="Gemma3ForCausalLM",
        gguf="gemma3",
        tensors=(*_common(norms="plus_one"), *_head_norms("plus_one"), *_SANDWICH),
        scaled_embedding=True,
        end_of_turn="<end_of_turn>",
    ),
}
