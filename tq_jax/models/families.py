"""The decoder families: which layer class each runs and what its tensors are called in files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flax import nnx

from tq_jax.models.decoder import Block

LAYER = "{layer}"


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a family.

    Attributes:
        path: the decoder parameter it fills, dotted; below ``blocks`` one file tensor per layer.
        hf: its name in a Hugging Face checkpoint.
        gguf: its name in a GGUF file.
        gguf_rows: "rope_pairs" if GGUF stores its rows permuted for interleaved rotary positions.
    """

    path: str
    hf: str
    gguf: str
    gguf_rows: Literal["plain", "rope_pairs"] = "plain"

    @property
    def per_layer(self) -> bool:
        """Whether the file has one such tensor for every layer."""
        return LAYER in self.hf


@dataclass(frozen=True)
class Family:
    """A decoder architecture.

    Attributes:
        block: its layer class.
        tensors: all parameters but an untied head.
        head: the output head, absent from files of tied models.
        hf_buffers: endings of Hugging Face tensor names that hold constants, not parameters.
    """

    block: type[nnx.Module]
    tensors: tuple[Tensor, ...]
    head: Tensor
    hf_buffers: tuple[str, ...] = ()


def _layer(path: str, hf: str, gguf: str, gguf_rows: Literal["plain", "rope_pairs"] = "plain") -> Tensor:
    return Tensor(f"blocks.{path}", f"model.layers.{LAYER}.{hf}.weight", f"blk.{LAYER}.{gguf}.weight", gguf_rows)


FAMILIES = {
    "llama": Family(
        block=Block,
        tensors=(
            Tensor("embedding.embedding", "model.embed_tokens.weight", "token_embd.weight"),
            _layer("attention_norm.scale", "input_layernorm", "attn_norm"),
            _layer("attention.query.kernel", "self_attn.q_proj", "attn_q", "rope_pairs"),
            _layer("attention.key.kernel", "self_attn.k_proj", "attn_k", "rope_pairs"),
            _layer("attention.value.kernel", "self_attn.v_proj", "attn_v"),
            _layer("attention.output.kernel", "self_attn.o_proj", "attn_output"),
            _layer("mlp_norm.scale", "post_attention_layernorm", "ffn_norm"),
            _layer("mlp.gate.kernel", "mlp.gate_proj", "ffn_gate"),
            _layer("mlp.up.kernel", "mlp.up_proj", "ffn_up"),
            _layer("mlp.down.kernel", "mlp.down_proj", "ffn_down"),
            Tensor("norm.scale", "model.norm.weight", "output_norm.weight"),
        ),
        head=Tensor("head.kernel", "lm_head.weight", "output.weight"),
        hf_buffers=("rotary_emb.inv_freq",),
    ),
}
