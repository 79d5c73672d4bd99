import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fake_quant_hf import given  # noqa: E402

from interop.hf import TurboQuantCache  # noqa: E402
from interop.hf.capture import capture  # noqa: E402


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_attention_is_given(model, attention, tmp_path):
    """Keys and values are those a cache holds, prompt and decoded tokens; the logits are as without."""
    model.set_attn_implementation(attention)
    ids = torch.arange(1, 19).reshape(2, 9)
    cache, plain = transformers.DynamicCache(config=model.config), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        with capture(model, layers=[0, 2]) as captured:
            logits = [model(part, **given(cache)).logits for part in (ids[:, :8], ids[:, 8:])]
        want = [model(part, **given(plain)).logits for part in (ids[:, :8], ids[:, 8:])]
    assert all(torch.equal(a, b) for a, b in zip(logits, want, strict=True))
    assert sorted(captured.keys) == [0, 2] and model.config._attn_implementation == attention
    for layer in (0, 2):
        assert torch.equal(captured.keys[layer].transpose(1, 2), plain.layers[layer].keys)
        assert torch.equal(captured.values[layer].transpose(1, 2), plain.layers[layer].values)
        assert captured.queries[layer].shape == (2, 9, 4, 32)
    captured.save(tmp_path / "kv.npz")
    with np.load(tmp_path / "kv.npz") as saved:
        np.testing.assert_array_equal(saved["k2"], captured.keys[2])


def test_limits(model):
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), capture(model, max_tokens=5) as captured:
        model(torch.ones(1, 9, dtype=torch.long))
    assert captured.values[1].shape == (1, 5, 2, 32)


def test_unknown_attention(model):
    model.config._attn_implementation, name = "mine", model.config._attn_implementation
    try:
        with pytest.raises(NotImplementedError, match="got 'mine'"), capture(model):
            pass
    finally:
        model.config._attn_implementation = name


def test_a_failure_restores_the_model(model):
    model.set_attn_implementation("sdpa")
    with pytest.raises(KeyError), capture(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    assert TurboQuantCache(model.config).compressed_layers == [0, 1, 2]


def bart():
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, **sizes
    )
    return transformers.BartForConditionalGeneration(config).eval()


def vit():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes)).eval()


def test_attentions_that_share_a_number_or_have_none():
    cases = [
        (
            "one attention per layer, got a BartAttention and a BartAttention of layer 0",
            bart(),
            torch.ones(1, 5).long(),
        ),
        ("attentions that know their layer_idx, got a ViT", vit(), torch.ones(1, 3, 16, 16)),
    ]
    for message, model, given_ in cases:
        with pytest.raises(NotImplementedError, match=message), torch.no_grad(), capture(model):
            model(given_)
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_is_refused(model, attention):
    """Its newest keys are not its last."""
    model.set_attn_implementation(attention)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    cache.early_initialization(2, 2, 32, torch.float32, torch.device("cpu"))
    message, ids = "expected the newest keys to be the last", torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        with pytest.raises(NotImplementedError, match=message), capture(model):
            model(ids, **given(cache))
        cache.reset()
        model(ids, **given(cache))
        with pytest.raises(NotImplementedError, match=message), capture(model):
            model(ids[:, :1], **given(cache))


def test_models_that_cannot_be_recorded(model):
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    message = "goes through AttentionInterface, got FalconForCausalLM"
    with pytest.raises(NotImplementedError, match=message), capture(falcon):
        pass
    model.set_attn_implementation("sdpa")
    model.model.config = copy.deepcopy(model.config)
    try:
        model.model.config._attn_implementation = "eager"
        message = r"one attention implementation .*, got \['eager', 'sdpa'\]"
        with pytest.raises(NotImplementedError, match=message), capture(model):
            pass
    finally:
        model.model.config = model.config
