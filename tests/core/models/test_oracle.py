"""The default model against the GGUF loader and the network of transformers, on real text."""

import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from tq_jax.models import generate, pad_prompts

pytestmark = pytest.mark.weights

SPEC = tq.CacheSpec.full_precision(num_kv_heads=3, head_dim=64, max_tokens=256, dtype="float32")
STEPS = 8


@pytest.fixture(scope="module")
def text(smollm) -> list[int]:
    return smollm.tokenizer.encode(pydoc_data.topics.topics["with"])[:160]


@pytest.fixture(scope="module")
def expected(text, oracle_logits) -> np.ndarray:
    return oracle_logits(text)


def relative(found, expected) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def test_prefill_and_decode(smollm, text, expected):
    decoder, count = smollm.decoder, len(text) - STEPS
    assert decoder.config.num_layers == 30
    tokens = jnp.asarray([text[:count]], jnp.int32)
    prefill = jax.jit(lambda decoder, cache: decoder.prefill(tokens, cache), donate_argnums=1)
    hidden, cache = prefill(decoder, decoder.init_cache(SPEC, batch=1))
    assert relative(decoder.logits(hidden)[0], expected[:count]) < 1e-5

    extend = jax.jit(lambda decoder, tokens, cache: decoder.extend(tokens, cache), donate_argnums=2)
    for t in range(count, len(text)):
        hidden, cache = extend(decoder, jnp.asarray([[text[t]]], jnp.int32), cache)
        assert relative(decoder.logits(hidden)[0, 0], expected[t]) < 1e-5


def test_a_teacher_forced_chunk(smollm, text, expected):
    decoder, half = smollm.decoder, len(text) // 2
    chunks = jnp.asarray([text], jnp.int32).reshape(2, 1, half)
    extend = jax.jit(lambda decoder, tokens, cache: decoder.extend(tokens, cache), donate_argnums=2)
    first, cache = extend(decoder, chunks[0], decoder.init_cache(SPEC, batch=1))
    second, cache = extend(decoder, chunks[1], cache)
    found = decoder.logits(jnp.concatenate([first, second], axis=1))[0]
    assert relative(found, expected) < 1e-5


def test_greedy_answers(smollm, oracle):
    import torch

    questions = ["Why is the sky blue?", "Name three colours."]
    prompts = [smollm.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]
    tokens, lengths = pad_prompts(prompts)
    stop = smollm.config.stop_tokens
    out = generate(smollm.decoder, tokens, lengths, cache_spec=SPEC, max_new_tokens=24, stop_tokens=stop)
    assert set(stop) == {2, 0}  # <|im_end|>, and <|endoftext|>, which ends texts whatever a file says
    for prompt, found in zip(prompts, out.sequences(), strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            theirs = oracle.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=list(stop),
                pad_token_id=2,
            )
        assert found == theirs[0, len(prompt) :].tolist()


def test_a_compressed_cache_answers(smollm):
    quantizer = tq.QuantizerSpec(dim=64, bits=4)
    spec = tq.CacheSpec(num_kv_heads=3, head_dim=64, max_tokens=256, key=quantizer, value=quantizer, window=16)
    answer = smollm.chat(
        [{"role": "user", "content": "What is the capital of France?"}], cache_spec=spec, max_new_tokens=16
    )
    assert "Paris" in answer
