"""Real GGUF files against the loader of transformers: every file in the folder that TQ_JAX_TEST_MODELS names.

Nothing is downloaded here. Qwen2.5-Coder-0.5B-Instruct (Q4_K_M) and Gemma 3 270M (Q4_K_M) are known to pass.
"""

import os
import pydoc_data.topics
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from tq_jax.models import generate, load_model, pad_prompts

FOLDER = os.environ.get("TQ_JAX_TEST_MODELS", "")
FILES = sorted(Path(FOLDER).glob("*.gguf")) if FOLDER else []
TEXT = pydoc_data.topics.topics["with"]
STEPS, NEW = 4, 12

pytestmark = [
    pytest.mark.weights,
    pytest.mark.slow,
    pytest.mark.skipif(not FILES, reason="TQ_JAX_TEST_MODELS names no folder of GGUF files"),
]


@pytest.fixture(scope="module", params=FILES, ids=[path.stem for path in FILES])
def pair(request):
    """The model here, the transformers model and the transformers tokenizer of one file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        oracle = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return load_model(path), oracle.eval(), tokenizer


def test_same_tokens_logits_and_text(pair):
    import torch

    model, oracle, tokenizer = pair
    decoder, ids = model.decoder, model.tokenizer.encode(TEXT)
    assert ids == tokenizer(TEXT).input_ids
    # If there is a sliding window, the text is longer, so that local layers see less than the others.
    window = decoder.config.sliding_window
    ids = ids[: 160 if window is None else window + 60]
    count = len(ids) - STEPS
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()

    def relative(found, expected) -> float:
        return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())

    spec = tq.CacheSpec.full_precision(
        num_kv_heads=decoder.config.num_kv_heads,
        head_dim=decoder.config.head_dim,
        max_tokens=len(ids) + NEW,
        dtype="float32",
    )
    prefill = jax.jit(lambda decoder, tokens, cache: decoder.prefill(tokens, cache), donate_argnums=2)
    extend = jax.jit(lambda decoder, tokens, cache: decoder.extend(tokens, cache), donate_argnums=2)
    hidden, cache = prefill(decoder, jnp.asarray([ids[:count]]), decoder.init_cache(spec, batch=1))
    assert relative(decoder.logits(hidden)[0], expected[:count]) < 1e-4
    for t in range(count, len(ids)):
        hidden, cache = extend(decoder, jnp.asarray([[ids[t]]]), cache)
        assert relative(decoder.logits(hidden)[0, 0], expected[t]) < 1e-4

    tokens, lengths = pad_prompts([ids])
    found = generate(decoder, tokens, lengths, cache_spec=spec, max_new_tokens=NEW).sequences()[0]
    prompt = torch.tensor([ids])
    with torch.no_grad():
        theirs = oracle.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert found == theirs[0, len(ids) :].tolist()
