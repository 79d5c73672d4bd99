"""Small models of Tunix with random weights, and a tokenizer without a file."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Tunix deprecates itself, or uses of JAX although it is deprecated
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.gemma import model as gemma_model
    from tunix.models.gemma3 import model as gemma3_model
    from tunix.models.llama3 import model as llama3_model
    from tunix.models.qwen2 import model as qwen2_model
    from tunix.models.qwen3 import model as qwen3_model

LAYERS, HEADS, KV_HEADS, HEAD_DIM, FEATURES, VOCABULARY, CACHE = 2, 4, 2, 32, 64, 61, 96


@dataclasses.dataclass
class Tokenizer:
    """A token per letter."""

    pad: int = 0

    def encode(self, text):
        return [3 + ord(letter) % (VOCABULARY - 3) for letter in text]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return self.pad


def gemma2():
    kinds = (gemma_model.AttentionType.LOCAL_SLIDING, gemma_model.AttentionType.GLOBAL)
    return gemma_model.Gemma, gemma_model.ModelConfig(
        num_layers=LAYERS, num_embed=VOCABULARY, embed_dim=FEATURES, hidden_dim=96, num_heads=HEADS, head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS, final_logit_softcap=30.0, use_post_attn_norm=True, use_post_ffw_norm=True,
        attention_types=kinds, attn_logits_soft_cap=5.0, sliding_window_size=12,
    )  # fmt: skip


def gemma3():
    config = gemma3_model.ModelConfig.gemma3_270m()
    config = dataclasses.replace(
        config, num_layers=6, num_embed=VOCABULARY, embed_dim=FEATURES, hidden_dim=96, num_heads=HEADS,
        head_dim=HEAD_DIM, num_kv_heads=1, sliding_window_size=12, param_dtype=jnp.float32,
    )  # fmt: skip
    return gemma3_model.Gemma3, config


def llama3():
    return llama3_model.Llama3, small(llama3_model.ModelConfig)


def qwen2():
    return qwen2_model.Qwen2, small(qwen2_model.ModelConfig)


def qwen3():
    return qwen3_model.Qwen3, small(qwen3_model.ModelConfig, use_tied_embedding=True)


def small(config, **options):
    """A small configuration of the fields that Llama and Qwen have."""
    sizes = dict(
        num_layers=LAYERS, vocab_size=VOCABULARY, embed_dim=FEATURES, hidden_dim=96, num_heads=HEADS, head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS, rope_theta=10_000, norm_eps=1e-6,
    )  # fmt: skip
    return config(**sizes, **options)


FAMILIES = {"gemma2": gemma2, "gemma3": gemma3, "llama3": llama3, "qwen2": qwen2, "qwen3": qwen3}


def make_model(family, seed=0):
    """A model of random weights: matrices that keep the size of what they multiply, biases and norms near theirs."""
    kind, config = FAMILIES[family]()
    model = kind(config, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    rng = np.random.default_rng(seed)

    def draw(x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        return jnp.asarray(x + 0.2 * noise if x.ndim == 1 else noise / np.sqrt(FEATURES), jnp.float32)

    nnx.update(model, jax.tree.map(draw, state))
    return model


def make_sampler(model, *, pad=0):
    heads = model.layers[0].attn.num_kv_heads
    return Sampler(model, Tokenizer(pad), CacheConfig(CACHE, len(model.layers), heads, HEAD_DIM))
