import dataclasses

import pytest

from tq_jax.models import DecoderConfig, config_from_gguf, config_from_hf
from tq_jax.models.config import config_to_hf

GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.vocab_size": 100,
    "tokenizer.ggml.eos_token_id": 2,
}
EXPECTED = DecoderConfig(
    vocab_size=100, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, rope_base=5000.0,
    norm_eps=1e-5, tied_head=True, max_context=64, stop_tokens=(2,),
)  # fmt: skip


def test_gguf_and_hf_describe_the_same_decoder():
    assert config_from_gguf(GGUF, tied_head=True) == EXPECTED
    assert config_from_hf(config_to_hf(EXPECTED)) == EXPECTED
    assert hash(EXPECTED) == hash(dataclasses.replace(EXPECTED))


def test_both_places_of_the_rope_base():
    config = config_to_hf(EXPECTED)
    base = config.pop("rope_theta")
    assert config_from_hf(config | {"rope_parameters": {"rope_theta": base, "rope_type": "default"}}) == EXPECTED


def test_stop_tokens_of_both_files():
    found = config_from_hf(config_to_hf(EXPECTED), generation_config={"eos_token_id": [5, 2]})
    assert found.stop_tokens == (2, 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("general.architecture", "qwen2"),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.expert_count", 8),
        ("llama.rope.dimension_count", 4),
        ("llama.attention.value_length", 16),
    ],
)
def test_gguf_options_that_change_the_arithmetic_are_refused(field, value):
    with pytest.raises(NotImplementedError, match=str(value)):
        config_from_gguf(GGUF | {field: value}, tied_head=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("sliding_window", 128),
    ],
)
def test_hf_options_that_change_the_arithmetic_are_refused(field, value):
    with pytest.raises(NotImplementedError, match="supported is"):
        config_from_hf(config_to_hf(EXPECTED) | {field: value})


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match=r"expected the field llama.block_count, got none"):
        config_from_gguf({k: v for k, v in GGUF.items() if k != "llama.block_count"}, tied_head=True)
    config = config_to_hf(EXPECTED)
    del config["rms_norm_eps"]
    with pytest.raises(ValueError, match="expected the field 'rms_norm_eps', got none"):
        config_from_hf(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected a positive number, got 0"),
        ({"num_kv_heads": 3}, "expected a divisor of num_heads=4, got 3"),
        ({"head_dim": 7}, "expected an even number"),
        ({"stop_tokens": (100,)}, r"expected ids in \[0, 100\), got 100"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXPECTED, **change)
