"""Fixtures: a tiny random decoder for most tests, and the default model with an independent oracle for the others."""

import dataclasses
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tq_jax as tq
from tq_jax.models import Decoder, DecoderConfig, convert_gguf, fetch_default_model, load_model

TINY = DecoderConfig(
    vocab_size=300, dim=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=80, max_context=512
)


@pytest.fixture(scope="session")
def tiny() -> Decoder:
    return Decoder(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def hybrid() -> Decoder:
    """A decoder with all parts that families may have: local layers, their own rotary base, four norms, head norms."""
    config = dataclasses.replace(
        TINY, architecture="gemma3", sliding_window=12, local_layers=(True, False, True), local_rope_base=100.0
    )
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def exact_spec() -> tq.CacheSpec:
    return tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=16, max_tokens=128, dtype="float32")


@pytest.fixture(scope="session")
def packed_spec() -> tq.CacheSpec:
    quantizer = tq.QuantizerSpec(dim=16, bits=4)
    return tq.CacheSpec(
        num_kv_heads=2, head_dim=16, max_tokens=128, key=quantizer, value=quantizer, window=8, page_size=16
    )


@pytest.fixture(scope="session")
def prompts() -> tuple:
    """Three right-padded prompts of 23, 1 and 11 tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.vocab_size, (3, 23), dtype=np.int32)
    return jnp.asarray(tokens), jnp.asarray([23, 1, 11], jnp.int32)


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    return fetch_default_model()


@pytest.fixture(scope="session")
def smollm(gguf_path):
    convert_gguf(gguf_path)
    return load_model()


@pytest.fixture(scope="session")
def oracle(gguf_path):
    """The default model, read and run by transformers: neither the reader nor the network is from this package."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
        )
    return model.eval()


@pytest.fixture(scope="session")
def oracle_logits(oracle):
    """Function from the tokens of one sequence to the oracle's logits [t, vocab_size]."""
    import torch

    def run(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return oracle(torch.tensor([tokens])).logits[0].numpy()

    return run
