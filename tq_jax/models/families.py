"""The decoder families: the layer class of each, and the names of its tensors in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tq_jax.models.blocks import Block, Gemma3Block, Qwen2Block, Qwen3Block
from tq_jax.models.config import DecoderConfig

LAYER = "{layer}"
FileKind = Literal["hf", "gguf"]
GgufLayout = Literal["plain", "rope_pairs", "plus_one"]
Part = Literal["query", "key", "value", "gate", "up"]

PARTS: dict[Part | None, tuple[Any, ...]] = {
    None: (),
    # Axes of `Attention.qkv`: KV heads, then the query heads, the key head and the value head of each.
    "query": (slice(None), slice(None, -2)),
    "key": (slice(None), -2),
    "value": (slice(None), -1),
    # The first axis of `GatedMLP.gate_up`.
    "gate": (0,),
    "up": (1,),
}
"""Where a stored tensor lies in a parameter that joins several."""


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a family.

    Attributes:
        path: Dotted path of the parameter that it fills, in a block if there is one such tensor per layer.
        hf: Its name in a Hugging Face checkpoint, with `LAYER` for the number of the layer.
        gguf: Its name in a GGUF file, with `LAYER` for the number of the layer.
        gguf_layout: "rope_pairs" if GGUF files store its rows permuted for interleaved rotary positions, "plus_one" if
            they store the values plus one.
        part: The part of the parameter that it is; None for the whole parameter.
    """

    path: str
    hf: str
    gguf: str
    gguf_layout: GgufLayout = "plain"
    part: Part | None = None

    @property
    def per_layer(self) -> bool:
        """Whether a file has one such tensor per layer."""
        return LAYER in self.hf

    def names(self, kind: FileKind, *, num_layers: int) -> list[str]:
        """Its names in the files of a model.

        Args:
            kind: Kind of the files.
            num_layers: Number of layers of the model.

        Returns:
            One name per layer, or a single name if the tensor belongs to no layer.
        """
        name = self.hf if kind == "hf" else self.gguf
        return [name.format(layer=layer) for layer in range(num_layers if self.per_layer else 1)]

    def view(self, parameter: Any) -> Any:
        """Its part of a parameter of one layer: a view of a numpy array, a slice of a JAX array."""
        return parameter[PARTS[self.part]]


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
        hf_buffers: Endings of Hugging Face tensor names that hold constants, not parameters.
        head: The output head, absent from the files of tied models.
    """

    block: type[Block]
    hf_type: str
    hf_class: str
    gguf: str | None
    tensors: tuple[Tensor, ...]
    scaled_embedding: bool = False
    hf_buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    head: Tensor = Tensor("head.kernel", "lm_head.weight", "output.weight")

    def stored(self, *, tied_head: bool) -> tuple[Tensor, ...]:
        """The tensors that the files of a model hold."""
        return self.tensors if tied_head else (*self.tensors, self.head)


def _layer(
    path: str,
    hf: str,
    gguf: str,
    layout: GgufLayout = "plain",
    *,
    kind: Literal["weight", "bias"] = "weight",
    part: Part | None = None,
) -> Tensor:
    """A tensor of one layer, under its names in both kinds of files."""
    return Tensor(path, f"model.layers.{LAYER}.{hf}.{kind}", f"blk.{LAYER}.{gguf}.{kind}", layout, part)


def _common(*, projections: GgufLayout = "plain", norms: GgufLayout = "plain") -> tuple[Tensor, ...]:
    """The tensors of every family, without the norm before the feed-forward block."""
    return (
        Tensor("embedding.embedding", "model.embed_tokens.weight", "token_embd.weight"),
        _layer("attention_norm.scale", "input_layernorm", "attn_norm", norms),
        _layer("attention.qkv.kernel", "self_attn.q_proj", "attn_q", projections, part="query"),
        _layer("attention.qkv.kernel", "self_attn.k_proj", "attn_k", projections, part="key"),
        _layer("attention.qkv.kernel", "self_attn.v_proj", "attn_v", part="value"),
        _layer("attention.output.kernel", "self_attn.o_proj", "attn_output"),
        _layer("mlp.gate_up.kernel", "mlp.gate_proj", "ffn_gate", part="gate"),
        _layer("mlp.gate_up.kernel", "mlp.up_proj", "ffn_up", part="up"),
        _layer("mlp.down.kernel", "mlp.down_proj", "ffn_down"),
        Tensor("norm.scale", "model.norm.weight", "output_norm.weight", norms),
    )


def _head_norms(layout: GgufLayout = "plain") -> tuple[Tensor, ...]:
    """The norms of query heads and key heads."""
    return (
        _layer("attention.query_norm.scale", "self_attn.q_norm", "attn_q_norm", layout),
        _layer("attention.key_norm.scale", "self_attn.k_norm", "attn_k_norm", layout),
    )


_MLP_NORM = _layer("mlp_norm.scale", "post_attention_layernorm", "ffn_norm")
_HEADS: tuple[Part, ...] = ("query", "key", "value")
_BIASES = tuple(
    _layer("attention.qkv.bias", f"self_attn.{part[0]}_proj", f"attn_{part[0]}", kind="bias", part=part)
    for part in _HEADS
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
    ),
}


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
    family = FAMILIES[config.architecture]
    stored = family.stored(tied_head=config.tied_head)
    expected = {name for tensor in stored for name in tensor.names(kind, num_layers=config.num_layers)}
    if missing := sorted(expected - found):
        raise ValueError(f"{source}: expected {len(expected)} tensors, got none named {', '.join(missing[:4])}")
    constants = family.hf_buffers if kind == "hf" else ()
    extra = found - expected.union(family.head.names(kind, num_layers=1))
    if extra := {name for name in extra if not name.endswith(constants)}:
        raise NotImplementedError(f"{source}: tensor {min(extra)!r} is no part of the {config.architecture} decoder")
