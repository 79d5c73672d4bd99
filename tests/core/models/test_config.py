import contextlib
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import GIVEN, JSON

from tq_jax.models import DecoderConfig, RopeScaling, config_from_gguf, config_from_hf
from tq_jax.models.config_gguf import llama3_scaling
from tq_jax.models.config_hf import config_to_hf

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
        ("general.architecture", "mamba"),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.expert_group_count", 8),
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
        ("model_type", "mamba"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_scaling", {"type": "dynamic", "factor": 8.0}),
        ("rope_parameters", {"rope_type": "default", "attention_factor": 2.0}),
        ("rope_parameters", {"sliding_attention": {"rope_theta": 1e3}}),
        ("layer_types", ["full_attention", "full_attention"]),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("use_bidirectional_attention", True),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("sliding_window", 128),
    ],
)
def test_hf_options_that_change_the_arithmetic_are_refused(field, value):
    with pytest.raises(NotImplementedError, match="supported (is|are)"):
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


ROTARY = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
COMMON = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
}
# These are the fields in the files of released models.
QWEN2 = COMMON | {
    "model_type": "qwen2",
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 512,
    "max_window_layers": 6,
}
MISTRAL = COMMON | {"model_type": "mistral", "rope_theta": 1e4, "hidden_act": "silu", "sliding_window": 512}
GEMMA3 = COMMON | {
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}


LONG = {"rope_type": "longrope", "long_factor": [2.0] * 12, "short_factor": [1.0] * 12}
LONG |= {"original_max_position_embeddings": 256}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
QWEN3_MOE = COMMON | {
    "model_type": "qwen3_moe",
    "rope_theta": 1e6,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 8,
}
MIXTRAL = COMMON | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
PHI3 = COMMON | {"model_type": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 512}
GEMMA2 = COMMON | {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "rope_theta": 10000.0,
}
OLMO2 = COMMON | {"model_type": "olmo2", "rope_theta": 5e5}
SMOLLM3 = COMMON | {"model_type": "smollm3", "no_rope_layer_interval": 4, "use_sliding_window": False}
GPT_OSS = COMMON | {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "swiglu_limit": 7.0,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "sliding_window": 128,
    "rope_theta": 150000,
    "rope_scaling": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


def test_released_files_of_experts():
    qwen, mixtral, gpt = (config_from_hf(fields) for fields in (QWEN3_MOE, MIXTRAL, GPT_OSS))
    assert (qwen.num_experts, qwen.experts_per_token, qwen.ffn_dim, qwen.normalized_experts) == (16, 4, 24, True)
    assert (mixtral.num_experts, mixtral.ffn_dim, mixtral.rope_base, mixtral.sliding_window) == (8, 96, 1e6, None)
    assert gpt.layer_windows == (128, None) * 4
    scaling = RopeScaling(kind="yarn", factor=4.0, original_context=256, whole_pairs=False)
    assert gpt.rope(128) == gpt.rope(None) == (150000.0, scaling)
    assert scaling.length == pytest.approx(0.1 * math.log(4) + 1)
    for config in (qwen, mixtral, gpt):
        assert config_from_hf(config_to_hf(config)) == config


def test_released_files_of_other_families():
    phi, gemma, olmo, smol = (
        config_from_hf(fields) for fields in (PHI3 | {"rope_scaling": LONG}, GEMMA2, OLMO2, SMOLLM3)
    )
    assert (phi.rotary_dim, phi.layer_windows, phi.tied_head) == (24, (512,) * 8, False)
    assert (gemma.attention_softcap, gemma.final_softcap, gemma.attention_scale) == (50.0, 30.0, 1 / 16)
    assert gemma.layer_windows == (512, None) * 4
    assert gemma.tied_head
    assert (olmo.layer_windows, olmo.layer_positions) == ((None,) * 8, (True,) * 8)
    assert smol.layer_positions == (True, True, True, False) * 2
    assert (smol.tied_head, smol.rope_base) == (True, 2e6)
    local = config_from_hf(SMOLLM3 | {"use_sliding_window": True, "sliding_window": 64})
    assert local.layer_windows == (None, None, None, 64) * 2
    for config in (phi, gemma, olmo, smol, local):
        assert config_from_hf(config_to_hf(config)) == config


def test_the_context_chooses_the_divisors_of_longrope():
    phi = config_from_hf(PHI3 | {"rope_scaling": LONG})
    long, short = phi.rope(None)[1], dataclasses.replace(phi, max_context=256).rope(None)[1]
    assert (long.divisors[0], short.divisors[0]) == (2.0, 1.0)
    assert long.length == short.length == math.sqrt(1 + math.log(1024 / 256) / math.log(256))
    assert config_from_hf(PHI3 | {"rope_scaling": LONG | {"rope_type": "su"}}) == phi


def test_released_qwen_and_mistral_files():
    qwen = config_from_hf(QWEN2)
    assert (qwen.architecture, qwen.sliding_window, qwen.local_layers, qwen.rope_base) == ("qwen2", None, (), 1e6)
    assert config_from_hf(QWEN2 | {"use_sliding_window": True}).layer_windows == (None,) * 6 + (512,) * 2
    mistral = config_from_hf(MISTRAL)
    assert mistral.layer_windows == (512,) * 8
    assert config_from_hf(MISTRAL | {"sliding_window": None}).layer_windows == (None,) * 8


def test_a_released_gemma_file():
    gemma = config_from_hf(GEMMA3)
    assert gemma.layer_windows == (512,) * 5 + (None,) + (512,) * 2
    assert gemma.tied_head
    assert gemma.attention_scale == 1 / 16
    assert gemma.rope(512) == (1e4, None)
    assert gemma.rope(None) == (1e6, RopeScaling(kind="linear", factor=8.0))
    assert config_from_hf(config_to_hf(gemma)) == gemma
    one_kind = config_from_hf(GEMMA3 | {"layer_types": ["full_attention"] * 8})
    assert (one_kind.sliding_window, one_kind.local_rope_base) == (None, None)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: supported is None"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA3, {"hidden_activation": "gelu"}, "hidden_activation='gelu': supported is 'gelu_pytorch_tanh'"),
        (GEMMA3, {"layer_types": ["chunked_attention"] * 8}, "layer_types='chunked_attention'"),
        (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "of sliding_attention='yarn'"),
        (QWEN2, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic': supported is 'default' or"),
        (MISTRAL, {"layer_types": ["full_attention"] * 8}, "layer_types=.*supported is None"),
        (MISTRAL, {"model_type": "mamba"}, "model_type='mamba': supported is 'llama' or 'mistral' or 'mixtral'"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step=2: supported is 1"),
        (QWEN3_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]: supported is \[\]"),
        (PHI3, {"rope_scaling": LONG | {"rope_type": "dynamic"}}, "rope_type='dynamic'"),
        (PHI3, {"rope_scaling": LONG | {"mscale": 1.0}}, "rope_parameters mscale=1.0"),
        (GPT_OSS, {"swiglu_limit": 5.0}, "swiglu_limit=5.0: supported is 7.0"),
        (GPT_OSS, {"attention_bias": False}, "attention_bias=False: supported is True"),
        (OLMO2, {"sliding_window": 64}, "sliding_window=64: supported is None"),
    ],
)
def test_options_of_families_are_refused(base, change, message):
    with pytest.raises(NotImplementedError, match=message):
        config_from_hf(base | change)


@pytest.mark.parametrize(
    ("base", "field"),
    [
        (GEMMA3, "query_pre_attn_scalar"),
        (GEMMA3, "sliding_window"),
        (GEMMA3, "head_dim"),
        (MISTRAL, "sliding_window"),
        (MISTRAL, "num_key_value_heads"),
        (QWEN2 | {"use_sliding_window": True}, "max_window_layers"),
        (MISTRAL | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0} | ROTARY}, "low_freq_factor"),
        (QWEN2 | {"rope_scaling": YARN}, "original_max_position_embeddings"),
        (QWEN3_MOE, "moe_intermediate_size"),
        (QWEN3_MOE, "num_experts"),
        (MIXTRAL, "num_experts_per_tok"),
        (PHI3 | {"rope_scaling": LONG}, "long_factor"),
        (GEMMA2, "attn_logit_softcapping"),
        (GPT_OSS, "rope_theta"),
    ],
)
def test_families_name_what_they_miss(base, field):
    scaling = {k: v for k, v in (base.get("rope_scaling") or {}).items() if k != field}
    lacking = {k: v for k, v in base.items() if k != field} | {"rope_scaling": scaling or None}
    with pytest.raises(ValueError, match=f"expected the field '{field}', got none"):
        config_from_hf(lacking)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_layers": (True,), "sliding_window": 4}, "local_layers: expected 2 flags, one per layer, got 1"),
        ({"local_layers": (True, False)}, "sliding_window: expected a number of tokens for the local layers, got None"),
        ({"sliding_window": 0}, "sliding_window: expected a positive number, got 0"),
        ({"no_rope_layers": (True,)}, "no_rope_layers: expected 2 flags, one per layer, got 1"),
        ({"rotary_dim": 10}, "rotary_dim: expected an even number up to head_dim=8, got 10"),
        ({"num_experts": 4}, "experts_per_token: expected 1 to num_experts=4, got 0"),
    ],
)
def test_layers_and_windows_agree(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXPECTED, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dynamic"}, "expected 'linear' or 'llama3' or 'yarn' or 'longrope', got 'dynamic'"),
        ({"kind": "yarn", "beta_fast": 0.5}, "expected 0 < beta_slow < beta_fast and a positive original_context, got"),
        ({"kind": "longrope"}, r"expected positive divisors for 'longrope' only, got \(\)"),
        ({"divisors": (1.0,)}, r"expected positive divisors for 'longrope' only, got \(1.0,\)"),
        ({"factor": 0.5}, "expected a factor of at least 1, got 0.5"),
        ({"low_freq_factor": 4.0}, "expected 0 < low_freq_factor < high_freq_factor"),
    ],
)
def test_scalings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"kind": "llama3", "factor": 8.0} | change)


def converted_factors(dim: int, base: float, factor: float) -> np.ndarray:
    """The tensor `rope_freqs.weight` as llama.cpp's converter writes it: one divisor per wavelength."""
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        blend = 1 / ((1 - smooth) / factor + smooth)
        out.append(1 if wavelength < 8192 / 4 else factor if wavelength > 8192 else blend)
    return np.array(out, np.float32)


@pytest.mark.parametrize(("dim", "factor"), [(64, 32.0), (128, 8.0)])
def test_divisors_of_gguf_files_are_llama_3s_rule(dim, factor):
    divisors = converted_factors(dim, 5e5, factor)
    assert 1 < len(np.unique(divisors)) < dim // 2
    assert llama3_scaling(divisors, head_dim=dim, base=5e5) == RopeScaling(kind="llama3", factor=factor)
    divisors[dim // 2 - 1] += 0.1
    with pytest.raises(NotImplementedError, match="rope_freqs.weight.*supported is Llama 3's rule"):
        llama3_scaling(divisors, head_dim=dim, base=5e5)


def test_scaled_gguf_files():
    scaled = GGUF | {"llama.rope.scaling.type": "linear"}
    with pytest.raises(ValueError, match="expected the field llama.rope.scaling.factor, got none"):
        config_from_gguf(scaled, tied_head=True)
    scaled |= {"llama.rope.scaling.factor": 2.0}
    assert config_from_gguf(scaled, tied_head=True).rope_scaling == RopeScaling(kind="linear", factor=2.0)
    with pytest.raises(NotImplementedError, match="'rope_freqs.weight' beside rope.scaling.type='linear'"):
        config_from_gguf(scaled, tied_head=True, rope_factors=np.ones(4, np.float32))


LLAMA_ENDS = ["a", "b", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]


@pytest.mark.parametrize(
    ("tokens", "fields", "expected"),
    [
        (LLAMA_ENDS, {"eos": 2}, {2, 3, 4}),  # the first files of Llama 3 name the end of texts alone
        (LLAMA_ENDS, {"eos": 3}, {2, 3, 4}),
        (["a", "b", "c", "d"], {"eos": 1, "eot": 3, "eom": 2}, {1, 2, 3}),
        (["a", "b", "<|endoftext|>", "<|im_end|>"], {"eos": 2}, {2, 3}),
        (["a", "<EOT>", "<|end|>", "b"], {"eos": 3}, {1, 2, 3}),
        (["a", "<|eot_id|"], {"eos": 0}, {0}),
    ],
)
def test_gguf_files_end_where_the_turn_ends(tokens, fields, expected):
    metadata = GGUF | {"tokenizer.ggml.tokens": tokens}
    metadata |= {f"tokenizer.ggml.{name}_token_id": index for name, index in fields.items()}
    assert set(config_from_gguf(metadata, tied_head=True).stop_tokens) == expected


def test_gemma_gguf_files():
    gemma = {k.replace("llama.", "gemma3."): v for k, v in GGUF.items()} | {
        "general.architecture": "gemma3",
        "gemma3.block_count": 7,
        "gemma3.attention.sliding_window": 16,
        "tokenizer.ggml.tokens": ["a"] * 9 + ["<end_of_turn>"],
    }
    config = config_from_gguf(gemma, tied_head=True)
    assert config.layer_windows == (16,) * 5 + (None, 16)
    assert (config.local_rope_base, config.attention_scale, config.stop_tokens) == (1e4, 8**-0.5, (2, 9))
    # Only the largest Gemma 3 scales scores by dim / heads, here 8. A head of another width shows the difference.
    wide = gemma | {"gemma3.block_count": 62, "gemma3.attention.key_length": 16}
    assert config_from_gguf(wide, tied_head=True).attention_scale == 8**-0.5
    with pytest.raises(NotImplementedError, match="gemma3.final_logit_softcapping=30.0"):
        config_from_gguf(gemma | {"gemma3.final_logit_softcapping": 30.0}, tied_head=True)


FILES = [config_to_hf(EXPECTED), QWEN2 | {"use_sliding_window": True}, MISTRAL, GEMMA3]
GEMMA3_GGUF = {k.replace("llama.", "gemma3."): v for k, v in GGUF.items()} | {
    "general.architecture": "gemma3",
    "gemma3.attention.sliding_window": 16,
    "gemma3.attention.sliding_window_pattern": 2,
    "tokenizer.ggml.tokens": ["a"] * 100,
}


@pytest.mark.slow
@given(st.sampled_from(FILES), st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_a_config_holds_is_read_or_refused(config, data):
    options = ("layer_types", "rope_parameters", "eos_token_id", "sliding_window_pattern", "rope_scaling")
    name, value = data.draw(st.sampled_from([*config, *options])), data.draw(JSON)
    if data.draw(st.booleans()):  # one level down
        inner = data.draw(st.sampled_from([*ROTARY, "rope_theta", "factor", "rope_type"]))
        name, value = "rope_parameters", {inner: value}
    with contextlib.suppress(ValueError, NotImplementedError):
        assert isinstance(config_from_hf(config | {name: value}), DecoderConfig)


@given(st.sampled_from([GGUF, GEMMA3_GGUF]), st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_gguf_metadata_holds_is_read_or_refused(metadata, data):
    name, value = data.draw(st.sampled_from([*metadata])), data.draw(GIVEN)
    with contextlib.suppress(ValueError, NotImplementedError):
        assert isinstance(config_from_gguf(metadata | {name: value}, tied_head=True), DecoderConfig)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "64"}, r"expected hidden_size to be a positive whole number below 2\*\*31, got '64'"),
        ({"num_attention_heads": 0}, "expected num_attention_heads to be a positive whole number"),
        ({"rms_norm_eps": float("nan")}, "expected rms_norm_eps to be a positive number below 1e300, got nan"),
        ({"tie_word_embeddings": "false"}, "expected tie_word_embeddings to be true or false, got 'false'"),
        ({"eos_token_id": [2, "x"]}, r"expected eos_token_id to be .* or a list whose items are each .*'x'\]"),
        ({"rope_scaling": "linear"}, "expected rope_scaling to be a table, got 'linear'"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "config.json rope_parameters: expected rope_theta to be"),
        ({"rope_parameters": {"full_attention": 3}}, "config.json rope_parameters: expected full_attention to be"),
    ],
)
def test_fields_of_another_type_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(config_to_hf(EXPECTED) | change)


def test_gguf_files_of_experts_say_how_many_a_token_takes():
    with pytest.raises(ValueError, match="expected the field llama.expert_used_count, got none"):
        config_from_gguf(GGUF | {"llama.expert_count": 4}, tied_head=True)
    found = config_from_gguf(GGUF | {"llama.expert_count": 4, "llama.expert_used_count": 2}, tied_head=True)
    assert (found.architecture, found.num_experts, found.experts_per_token) == ("mixtral", 4, 2)
    assert config_from_gguf(GGUF | {"llama.expert_count": 0}, tied_head=True) == EXPECTED


def test_the_scale_of_the_largest_gemma_2():
    fields = {key.replace("llama", "gemma2"): value for key, value in GGUF.items()}
    fields |= {"general.architecture": "gemma2", "gemma2.attention.key_length": 16, "gemma2.attention.value_length": 16}
    fields |= {"gemma2.attention.sliding_window": 8, "gemma2.attn_logit_softcapping": 50.0}
    with pytest.raises(ValueError, match="expected the field gemma2.final_logit_softcapping, got none"):
        config_from_gguf(fields, tied_head=True)
    fields |= {"gemma2.final_logit_softcapping": 30.0}
    assert config_from_gguf(fields, tied_head=True).query_scalar == 16
    assert config_from_gguf(fields | {"gemma2.block_count": 46}, tied_head=True).query_scalar == 32 / 4


def test_yarn_of_gguf_files():
    fields = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    with pytest.raises(ValueError, match="expected the field llama.rope.scaling.original_context_length, got none"):
        config_from_gguf(GGUF | fields, tied_head=True)
    fields |= {"llama.rope.scaling.original_context_length": 16}
    expected = RopeScaling(kind="yarn", factor=4.0, original_context=16)
    assert config_from_gguf(GGUF | fields, tied_head=True).rope_scaling == expected
