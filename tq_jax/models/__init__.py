"""Decoders over a compressed cache: loading, tokenizing, generating."""

from tq_jax.models.causal import causal_attention
from tq_jax.models.config import DecoderConfig
from tq_jax.models.config_gguf import config_from_gguf
from tq_jax.models.config_hf import config_from_hf
from tq_jax.models.decoder import Decoder
from tq_jax.models.fetch import cache_dir, fetch_default_model
from tq_jax.models.generate import Generation, generate, pad_prompts
from tq_jax.models.language_model import LanguageModel, load_model
from tq_jax.models.layer_caches import LayerCaches
from tq_jax.models.many import Finished, ManyGenerations, Tally, generate_many
from tq_jax.models.rope import RopeScaling
from tq_jax.models.sampling import Sampling
from tq_jax.models.sharding import MeshAxes, cache_shardings, decoder_shardings, shard
from tq_jax.models.tokenizer import Tokenizer, load_tokenizer
from tq_jax.models.weights import convert_gguf, load_decoder

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Finished",
    "Generation",
    "LanguageModel",
    "LayerCaches",
    "ManyGenerations",
    "MeshAxes",
    "RopeScaling",
    "Sampling",
    "Tally",
    "Tokenizer",
    "cache_dir",
    "cache_shardings",
    "causal_attention",
    "config_from_gguf",
    "config_from_hf",
    "convert_gguf",
    "decoder_shardings",
    "fetch_default_model",
    "generate",
    "generate_many",
    "load_decoder",
    "load_model",
    "load_tokenizer",
    "pad_prompts",
    "shard",
]
