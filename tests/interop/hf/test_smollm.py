"""A real model, converted from its GGUF file: the compressed cache against the fake-quantized oracle."""

import pydoc_data.topics

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from fake_quant_hf import fake_quant_cache, given  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.hf import ATTENTION, TurboQuantCache  # noqa: E402
from tq_jax.models import convert_gguf, fetch_default_model, load_tokenizer  # noqa: E402

pytestmark = pytest.mark.weights

FOUR = tq.QuantizerSpec(64, 4)
OPTIONS = dict(key=FOUR, value=FOUR, window=32, dtype="float32", smooth_keys=False, max_tokens=256)
SPEC = tq.CacheSpec(3, 64, **OPTIONS)


@pytest.fixture(scope="module")
def model():
    folder = convert_gguf(fetch_default_model())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module")
def prompts():
    """Two prompts of 120 and 85 tokens, left-padded; transformers reads the tokenizer of this GGUF file wrongly."""
    tokenizer = load_tokenizer(convert_gguf(fetch_default_model()))
    texts = [tokenizer.encode(pydoc_data.topics.topics[name]) for name in ("with", "yield")]
    pads = [0, 35]
    ids = torch.tensor([[2] * pad + text[: 120 - pad] for pad, text in zip(pads, texts, strict=True)])
    mask = torch.ones_like(ids)
    mask[1, :35] = 0
    return ids, mask, pads


@pytest.mark.slow
def test_tokens_are_those_of_the_oracle(model, prompts):
    """A left-padded batch; the other modes have a small random model."""
    ids, mask, pads = prompts
    options = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=2)
    model.set_attn_implementation("sdpa")
    theirs = model.generate(ids, **given(fake_quant_cache(model.config, SPEC, pads)), **options)
    model.set_attn_implementation(ATTENTION)
    cache = TurboQuantCache(model.config, **OPTIONS)
    assert torch.equal(model.generate(ids, **given(cache), **options), theirs)
    spec = cache.layers[0].cache.spec
    assert spec == SPEC and spec.bytes_per_token() / (2 * 2 * 3 * 64) < 0.28
