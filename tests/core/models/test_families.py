"""Every family with small random weights, saved by transformers and loaded here: equal logits and greedy text."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from tq_jax.models import RopeScaling, config_from_hf, load_decoder
from tq_jax.models.config_hf import config_to_hf
from tq_jax.models.gguf_file import hf_tensors, read_gguf

LAYERS, PROMPT, NEW, WINDOW = 3, 19, 7, 6
SIZES = dict(
    vocab_size=160,
    hidden_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=80,
    max_position_embeddings=512,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=8, short_factor=[1.0] * 8,
    long_factor=[1.0 + i for i in range(8)],
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
    original_max_position_embeddings=64,
)  # fmt: skip
CASES = {
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "mistral": ("Mistral", dict(sliding_window=WINDOW)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2_local": ("Qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True)),
    "yarn": (
        "Qwen2",
        dict(rope_parameters=YARN | dict(truncate=True, original_max_position_embeddings=8)),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False),
    ),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "phi3": ("Phi3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75))),
    "phi3_long": (
        "Phi3",
        dict(rope_parameters=LONGROPE, sliding_window=WINDOW, hidden_size=64, original_max_position_embeddings=8),
    ),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0, 1])),
    "olmo2": ("Olmo2", {}),
    "gemma2": (
        "Gemma2",
        dict(sliding_window=WINDOW, query_pre_attn_scalar=20, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    ),
    "gpt_oss": (
        "GptOss",
        dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW, rope_parameters=YARN),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=20,
            rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=1e5, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=1e3),
            },
        ),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """The name of a case, the decoder here, and the transformers model that saved it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, options = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config_class = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
        config = config_class(**SIZES | options)
        oracle = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in oracle.parameters():  # norms and biases too, which start as ones and zeros
                parameter.add_(0.15 * torch.randn_like(parameter))
        oracle.save_pretrained(path)
    return request.param, load_decoder(path), oracle


@jax.jit
def prefill(decoder, tokens, cache):
    hidden, cache = decoder.prefill(tokens, cache)
    return decoder.logits(hidden)[0], cache


@jax.jit
def extend(decoder, tokens, cache):
    hidden, cache = decoder.extend(tokens, cache)
    return decoder.logits(hidden)[0], cache


def test_logits_and_greedy_text(pair):
    import torch

    _, decoder, oracle = pair
    prompt = np.random.default_rng(0).integers(0, 160, PROMPT).tolist()
    spec = tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=16, max_tokens=PROMPT + NEW, dtype="float32")
    found, cache = prefill(decoder, jnp.asarray([prompt]), decoder.init_cache(spec, batch=1))
    logits, text = [found], prompt.copy()
    for _ in range(NEW):
        text.append(int(found[-1].argmax()))
        found, cache = extend(decoder, jnp.asarray([text[-1:]]), cache)
        logits.append(found)
    ids = torch.tensor([prompt])
    greedy = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        theirs = oracle.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0].tolist()
        expected = oracle(torch.tensor([text])).logits[0].numpy()
    assert np.abs(np.concatenate(logits) - expected).max() < 1e-4 * np.abs(expected).max()
    assert text == theirs


def test_configs_survive(pair):
    import transformers

    name, decoder, oracle = pair
    written = json.loads(json.dumps(config_to_hf(decoder.config)))
    assert config_from_hf(written) == decoder.config
    theirs = type(oracle.config)(**written)
    assert isinstance(theirs, transformers.PretrainedConfig)
    for field in ("rope_parameters", "sliding_window", "layer_types", "query_pre_attn_scalar", "tie_word_embeddings"):
        assert getattr(theirs, field, None) == getattr(oracle.config, field, None), (name, field)


def test_what_the_families_read(pair):
    name, decoder, _ = pair
    windows = {
        "mistral": (WINDOW,) * LAYERS,
        "qwen2_local": (None, WINDOW, WINDOW),
        "gemma3": (WINDOW, None, WINDOW),
    }
    config = decoder.config
    assert config.layer_windows == windows.get(name, (None,) * LAYERS)
    if name == "gemma3":
        assert config.attention_scale == 20**-0.5
        assert (config.rope(WINDOW), config.rope(None)) == (
            (1e3, None),
            (1e5, RopeScaling(kind="linear", factor=8.0)),
        )
    assert dataclasses.replace(config, stop_tokens=()) == config


def write_gguf(path, config, state) -> None:
    """A file of the public converter: names by the gguf package, Llama's projections permuted, Gemma's norms + 1."""
    import gguf

    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
    arch = arch.get(config.architecture, gguf.MODEL_ARCH.GEMMA3)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
        writer.add_array("gemma3.attention.sliding_window_pattern", list(config.local_layers))
        writer.add_float32("gemma3.rope.freq_base_swa", config.local_rope_base)
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    for name, tensor in state.items():
        array = tensor.numpy()
        if arch == gguf.MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
            array = array.reshape(-1, 2, config.head_dim // 2, config.dim).swapaxes(1, 2).reshape(array.shape)
        if arch == gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
            array = array + 1
        if not (config.tied_head and name == "lm_head.weight"):
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_hold_the_same_decoder(pair, tmp_path):
    name, decoder, oracle = pair
    if name not in ("linear", "qwen2", "qwen3", "gemma3"):
        pytest.skip("no such GGUF files")
    write_gguf(tmp_path / "x.gguf", decoder.config, state := oracle.state_dict())
    file = read_gguf(tmp_path / "x.gguf")
    # Files of Gemma do not hold the query scalar. Except in one size of the model, it is the width of a head.
    scalar = None if decoder.config.query_scalar is None else 16.0
    # GGUF holds epsilons and bases in float32.
    exact = dict(query_scalar=scalar, norm_eps=float(np.float32(decoder.config.norm_eps)))
    assert file.config == dataclasses.replace(decoder.config, **exact)
    found = hf_tensors(file)
    assert found.keys() == {key for key in state if not (key == "lm_head.weight" and decoder.config.tied_head)}
    for key, array in found.items():
        np.testing.assert_allclose(array, state[key].numpy(), rtol=0, atol=2e-7, err_msg=key)
