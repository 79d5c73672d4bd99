"""Models whose layers hold more than keys and values, and models that cannot have the cache."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fake_quant_hf import given  # noqa: E402
from tiny_hf import tiny  # noqa: E402

from interop.hf import CompressedLayer, TurboQuantCache  # noqa: E402
from interop.hf.cache import _compressed  # noqa: E402
from interop.hf.layer import VERSION, Compression, layer_bytes  # noqa: E402
from interop.hf.models import SHARES_IN_A_PASS, require_supported  # noqa: E402

LATENTS = dict(kv_lora_rank=32, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, q_lora_rank=None)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(model_type="falcon"), "through transformers' AttentionInterface, got FalconForCausalLM"),
        (dict(model_type="bloom", architectures=["MyBloom"]), "got MyBloom with BloomForCausalLM: use DynamicCache"),
        (
            dict(model_type="deepseek_v3", **LATENTS),
            "latents and no keys .* DeepseekV3ForCausalLM with kv_lora_rank=32",
        ),
    ],
)
def test_models_that_cannot_have_the_cache(config, message):
    """By the configuration alone: weights, which take minutes to load, need not be there."""
    with pytest.raises(NotImplementedError, match=message):
        TurboQuantCache(transformers.AutoConfig.for_model(**config))


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        ("Qwen3Next", {}, "linear_attention"),
        ("FalconH1", {}, "hybrid|mamba"),
        ("Zamba2", {}, "hybrid|mamba"),
        ("Lfm2", dict(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "conv"),
    ],
)
def test_hybrids_need_transformers_5(kind, given, named):
    """The caches of version 4 look like those of attention for all layers of these models."""
    config = getattr(transformers, f"{kind}Config")(**given)
    with pytest.raises(NotImplementedError, match=rf"layers of .*({named}).* by transformers 5, got {kind}ForCausalLM"):
        require_supported(config, version=(4, 57))
    assert require_supported(transformers.LlamaConfig(), version=(4, 57)) == "LlamaForCausalLM"
    attention = transformers.GraniteMoeHybridConfig(num_hidden_layers=2, layer_types=["attention"] * 2)
    assert require_supported(attention, version=(4, 57)) == "GraniteMoeHybridForCausalLM"


@pytest.mark.parametrize("kind", ["gemma3n", "gemma3n_text"])
def test_layers_that_share_need_a_newer_release(kind):
    config = transformers.AutoConfig.for_model(kind)
    with pytest.raises(NotImplementedError, match="hand each other .* got Gemma3n.* num_kv_shared_layers=15: pip inst"):
        require_supported(config, version=(5, 5))
    assert "Gemma3n" in require_supported(config, version=SHARES_IN_A_PASS)


def test_states_of_older_releases():
    """Transformers 5.10 has one state per layer, and no number of them."""
    older = type("LinearAttentionAndFullAttentionLayer", (), {})()
    with pytest.raises(
        NotImplementedError, match=r"read as transformers 5.14 and newer .* the model in transformers \d"
    ):
        _compressed(older, Compression(4, 4, None, 0, {}), None)


SMALL = dict(mamba_d_state=16, mamba_chunk_size=16, chunk_size=16, mamba_n_groups=1)
WITH_STATE = {
    "FalconH1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16),
    "Zamba2": dict(
        num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, n_mamba_heads=8, mamba_headdim=16,
        attention_head_dim=32, attention_hidden_size=128, num_mem_blocks=1,
    ),
    "Zaya": dict(num_experts=2, moe_intermediate_size=32, router_hidden_size=16),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:TurboQuantCache compresses 2 of 4 layers:UserWarning")
@pytest.mark.parametrize("kind", WITH_STATE)
def test_layers_of_attention_and_state_space(ids, kind):
    """Attention is compressed, the state is kept: exact tokens within the window, beams and an emptied cache too."""
    if not hasattr(transformers, f"{kind}Config") or VERSION < (5, 14):
        pytest.skip("transformers before 5.14")
    ours, stock = (tiny(kind, attention, **SMALL, **WITH_STATE[kind]) for attention in ("tq_jax", "sdpa"))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for more in ({}, dict(num_beams=2)):
        cache, exact = TurboQuantCache(ours.config), transformers.DynamicCache(config=stock.config)
        expected = stock.generate(ids, **given(exact), **options, **more)
        assert torch.equal(ours.generate(ids, **given(cache), **options, **more), expected)
    both = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
    assert len(both) == 2 and cache.nbytes == sum(layer_bytes(layer) for layer in cache.layers)
    assert all(0 < layer.cache.nbytes < layer.nbytes for layer in both)
    cache.reset()
    ids, options["attention_mask"] = ids.flip(0).repeat_interleave(2, 0), mask.flip(0).repeat_interleave(2, 0)
    assert torch.equal(ours.generate(ids, **given(cache), **options), stock.generate(ids, **options))
