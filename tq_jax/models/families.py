"""The decoder families: the layer class of each, and the names of its tensors in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tq_jax.models.blocks import Block, Gemma2Block, Gemma3Block, Olmo2Block, Qwen2Block, Qwen3Block
from tq_jax.models.config import DecoderConfig
from tq_jax.models.mixture import GptOssBlock, MixtralBlock, Mixture, Qwen3MoeBlock
from tq_jax.models.tensors import EXPERT, LAYER, FileKind, GgufLayout, HfLayout, Part, Tensor

_HEAD = Tensor("head.kernel", "lm_head.weight", "output.weight")


@dataclass(frozen=True)
class Family:
    """A decoder architecture.

    Attributes:
        block: Its layer class.
        hf_type: `model_type` of its `config.json`.
        hf_class: Class that transformers loads it with.
        gguf: `general.architecture` of its GGUF files; None if they name another family.
        tensors: All parameters except an untied output head.
        scaled_embedding: Whether token embeddings are multiplied by sqrt(dim).
        shares_heads: Whether its heads and channels can be spread over the devices of a mesh.
        hf_buffers: Endings of Hugging Face tensor names that hold constants, not parameters.
        head: The output head, absent from the files of tied models.
    """

    block: type[Block]
    hf_type: str
    hf_class: str
    gguf: str | None
    tensors: tuple[Tensor, ...]
    scaled_embedding: bool = False
    shares_heads: bool = True
    hf_buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    head: Tensor = _HEAD

    def stored(self, *, tied_head: bool) -> tuple[Tensor, ...]:
        """The tensors that the files of a model hold."""
        return self.tensors if tied_head else (*self.tensors, self.head)


def _layer(
    path: str,
    hf: str,
    gguf: str | tuple[str, ...],
    layout: GgufLayout = "plain",
    *,
    kind: Literal["weight", "bias"] = "weight",
    part: Part | tuple[Part, ...] = (),
) -> Tensor:
    """A tensor of one layer, under its names in both kinds of files."""
    parts = (part,) if isinstance(part, str) else part
    return Tensor(path, f"model.layers.{LAYER}.{hf}.{kind}", _gguf_names(gguf, kind), layout, parts)


def _gguf_names(names: str | tuple[str, ...], kind: str) -> str | tuple[str, ...]:
    if isinstance(names, str):
        return f"blk.{LAYER}.{names}.{kind}"
    return tuple(f"blk.{LAYER}.{name}.{kind}" for name in names)


def _ends(norms: GgufLayout = "plain") -> tuple[Tensor, ...]:
    """The token embedding and the last norm."""
    return (
        Tensor("embedding.embedding", "model.embed_tokens.weight", "token_embd.weight"),
        Tensor("norm.scale", "model.norm.weight", "output_norm.weight", norms),
    )


def _attention(projections: GgufLayout = "plain") -> tuple[Tensor, ...]:
    """The projections of attention, stored apart."""
    return (
        _layer("attention.qkv.kernel", "self_attn.q_proj", "attn_q", projections, part="query"),
        _layer("attention.qkv.kernel", "self_attn.k_proj", "attn_k", projections, part="key"),
        _layer("attention.qkv.kernel", "self_attn.v_proj", "attn_v", part="value"),
        _ATTENTION_OUTPUT,
    )


def _input_norm(norms: GgufLayout = "plain") -> Tensor:
    return _layer("attention_norm.scale", "input_layernorm", "attn_norm", norms)


def _head_norms(layout: GgufLayout = "plain") -> tuple[Tensor, ...]:
    """The norms of query heads and key heads."""
    return (
        _layer("attention.query_norm.scale", "self_attn.q_norm", "attn_q_norm", layout),
        _layer("attention.key_norm.scale", "self_attn.k_norm", "attn_k_norm", layout),
    )


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """A mixture whose experts are stored apart in checkpoints."""
    stem = f"{block}.experts.{EXPERT}"
    return (
        _layer("mlp.router.kernel", f"{block}.gate", "ffn_gate_inp"),
        _layer("mlp.gate_up.kernel", f"{stem}.{gate}", "ffn_gate_exps", part="gate"),
        _layer("mlp.gate_up.kernel", f"{stem}.{up}", "ffn_up_exps", part="up"),
        _layer("mlp.down.kernel", f"{stem}.{down}", "ffn_down_exps"),
    )


def _joint_expert(path: str, hf: str, gguf: str | tuple[str, ...], kind: Literal["weight", "bias"]) -> Tensor:
    """A tensor of all experts of a layer of gpt-oss, whose checkpoints say nothing after the name of a weight."""
    name = f"model.layers.{LAYER}.mlp.experts.{hf}{'_bias' * (kind == 'bias')}"
    layout: HfLayout = "inputs_first"
    return Tensor(f"mlp.{path}", name, _gguf_names(gguf, kind), hf_layout=layout)


_ATTENTION_OUTPUT = _layer("attention.output.kernel", "self_attn.o_proj", "attn_output")
_DOWN = _layer("mlp.down.kernel", "mlp.down_proj", "ffn_down")
_MLP = (
    _layer("mlp.gate_up.kernel", "mlp.gate_proj", "ffn_gate", part="gate"),
    _layer("mlp.gate_up.kernel", "mlp.up_proj", "ffn_up", part="up"),
    _DOWN,
)
_MLP_NORM = _layer("mlp_norm.scale", "post_attention_layernorm", "ffn_norm")
_HEADS: tuple[Part, ...] = ("query", "key", "value")
_BIASES = tuple(
    _layer("attention.qkv.bias", f"self_attn.{part[0]}_proj", f"attn_{part[0]}", kind="bias", part=part)
    for part in _HEADS
)
_FUSED = (
    _layer("attention.qkv.kernel", "self_attn.qkv_proj", "attn_qkv", part=_HEADS),
    _ATTENTION_OUTPUT,
    _layer("mlp.gate_up.kernel", "mlp.gate_up_proj", "ffn_up", part=("gate", "up")),
    _DOWN,
)
_POST_NORMS = (
    _layer("attention_post_norm.scale", "post_attention_layernorm", "post_attention_norm"),
    _layer("mlp_post_norm.scale", "post_feedforward_layernorm", "post_ffw_norm"),
)
_SANDWICH = (
    _layer("attention_post_norm.scale", "post_attention_layernorm", "post_attention_norm", "plus_one"),
    _layer("mlp_norm.scale", "pre_feedforward_layernorm", "ffn_norm", "plus_one"),
    _layer("mlp_post_norm.scale", "post_feedforward_layernorm", "post_ffw_norm", "plus_one"),
)
_LLAMA = (*_ends(), _input_norm(), *_attention("rope_pairs"), *_MLP, _MLP_NORM)
_GEMMA2 = (*_ends("plus_one"), _input_norm("plus_one"), *_attention(), *_MLP, *_SANDWICH)
_GPT_OSS = (
    *_ends(),
    _input_norm(),
    *_attention(),
    *_BIASES,
    _layer("attention.output.bias", "self_attn.o_proj", "attn_output", kind="bias"),
    Tensor("attention.sinks", f"model.layers.{LAYER}.self_attn.sinks", f"blk.{LAYER}.attn_sinks.weight"),
    _layer("mlp_norm.scale", "post_attention_layernorm", "post_attention_norm"),
    _layer("mlp.router.kernel", "mlp.router", "ffn_gate_inp"),
    _layer("mlp.router.bias", "mlp.router", "ffn_gate_inp", kind="bias"),
    _joint_expert("gate_up.kernel", "gate_up_proj", ("ffn_gate_exps", "ffn_up_exps"), "weight"),
    _joint_expert("gate_up.bias", "gate_up_proj", ("ffn_gate_exps", "ffn_up_exps"), "bias"),
    _joint_expert("down.kernel", "down_proj", "ffn_down_exps", "weight"),
    _joint_expert("down.bias", "down_proj", "ffn_down_exps", "bias"),
)

FAMILIES = {
    "llama": Family(block=Block, hf_type="llama", hf_class="LlamaForCausalLM", gguf="llama", tensors=_LLAMA),
    # GGUF files of Mistral models say "llama".
    "mistral": Family(block=Block, hf_type="mistral", hf_class="MistralForCausalLM", gguf=None, tensors=_LLAMA),
    # So do those of Mixtral models, which have fields of experts.
    "mixtral": Family(
        block=MixtralBlock,
        hf_type="mixtral",
        hf_class="MixtralForCausalLM",
        gguf=None,
        tensors=(
            *(*_ends(), _input_norm(), *_attention("rope_pairs"), _MLP_NORM),
            *_experts("block_sparse_moe", "w1", "w3", "w2"),
        ),
    ),
    "smollm3": Family(block=Block, hf_type="smollm3", hf_class="SmolLM3ForCausalLM", gguf="smollm3", tensors=_LLAMA),
    "phi3": Family(
        block=Block,
        hf_type="phi3",
        hf_class="Phi3ForCausalLM",
        gguf="phi3",
        tensors=(*_ends(), _input_norm(), *_FUSED, _MLP_NORM),
    ),
    "qwen2": Family(
        block=Qwen2Block,
        hf_type="qwen2",
        hf_class="Qwen2ForCausalLM",
        gguf="qwen2",
        tensors=(*_ends(), _input_norm(), *_attention(), *_MLP, *_BIASES, _MLP_NORM),
    ),
    "qwen3": Family(
        block=Qwen3Block,
        hf_type="qwen3",
        hf_class="Qwen3ForCausalLM",
        gguf="qwen3",
        tensors=(*_ends(), _input_norm(), *_attention(), *_MLP, *_head_norms(), _MLP_NORM),
    ),
    "qwen3_moe": Family(
        block=Qwen3MoeBlock,
        hf_type="qwen3_moe",
        hf_class="Qwen3MoeForCausalLM",
        gguf="qwen3moe",
        tensors=(
            *(*_ends(), _input_norm(), *_attention(), *_head_norms(), _MLP_NORM),
            *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
    ),
    "olmo2": Family(
        block=Olmo2Block,
        hf_type="olmo2",
        hf_class="Olmo2ForCausalLM",
        gguf="olmo2",
        tensors=(*_ends(), *_attention(), *_MLP, *_head_norms(), *_POST_NORMS),
        shares_heads=False,  # its norms go over all heads
    ),
    "gemma2": Family(
        block=Gemma2Block,
        hf_type="gemma2",
        hf_class="Gemma2ForCausalLM",
        gguf="gemma2",
        tensors=_GEMMA2,
        scaled_embedding=True,
    ),
    "gemma3": Family(
        block=Gemma3Block,
        hf_type="gemma3_text",
        hf_class="Gemma3ForCausalLM",
        gguf="gemma3",
        tensors=(*_GEMMA2, *_head_norms("plus_one")),
        scaled_embedding=True,
    ),
    "gpt_oss": Family(
        block=GptOssBlock,
        hf_type="gpt_oss",
        hf_class="GptOssForCausalLM",
        gguf="gpt-oss",
        tensors=_GPT_OSS,
        shares_heads=False,  # the biases of its outputs would be added once per device
    ),
}


def family_of(config: DecoderConfig) -> Family:
    """The family of a decoder.

    Raises:
        NotImplementedError: If the family is not in `FAMILIES`.
        ValueError: If the config has experts and the family has none, or the other way round.
    """
    if config.architecture not in FAMILIES:
        raise NotImplementedError(f"architecture {config.architecture!r}: supported are {sorted(FAMILIES)}")
    family = FAMILIES[config.architecture]
    mixed = issubclass(family.block.feed_forward, Mixture)
    if mixed != (config.num_experts > 0):
        wanted = "at least 1" if mixed else "0"
        raise ValueError(f"num_experts: expected {wanted} for {config.architecture}, got {config.num_experts}")
    return family


def tensor_names(config: DecoderConfig, *, kind: FileKind) -> set[str]:
    """The names of all tensors that the files of a decoder hold."""
    stored = FAMILIES[config.architecture].stored(tied_head=config.tied_head)
    return {name for tensor in stored for name in tensor.names(kind, config)}


def check_tensor_names(source: Path, config: DecoderConfig, found: set[str], *, kind: FileKind) -> None:
    """Check that a model's files hold exactly the tensors that its decoder needs.

    Tied checkpoints may repeat the embedding under the name of the head.

    Args:
        source: The file or directory, for messages.
        config: The decoder that the files describe.
        found: Names of the tensors in the files.
        kind: Kind of the files, which decides the names.

    Raises:
        NotImplementedError: If there is a tensor that the decoder does not have.
        ValueError: If a tensor is missing.
    """
    family, expected = FAMILIES[config.architecture], tensor_names(config, kind=kind)
    if missing := sorted(expected - found):
        raise ValueError(f"{source}: expected {len(expected)} tensors, got none named {', '.join(missing[:4])}")
    constants = family.hf_buffers if kind == "hf" else ()
    extra = found - expected.union(family.head.names(kind, config))
    if extra := {name for name in extra if not name.endswith(constants)}:
        raise NotImplementedError(f"{source}: tensor {min(extra)!r} is no part of the {config.architecture} decoder")
