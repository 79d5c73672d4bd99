"""Models whose later layers reuse the keys and values of earlier ones: the owners are stored, the others read them."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fake_quant_hf import given  # noqa: E402

from interop.hf import ATTENTION, CompressedLayer, TurboQuantCache  # noqa: E402
from interop.hf.layer import VERSION  # noqa: E402
from interop.hf.models import SHARES_IN_A_PASS  # noqa: E402

LAYERS = ["sliding_attention", "full_attention"]
SIZES = dict(
    vocab_size=199, vocab_size_per_layer_input=199, hidden_size=64, hidden_size_per_layer_input=8, intermediate_size=96,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, sliding_window=16,
    initializer_range=0.08, bos_token_id=1, eos_token_id=None, pad_token_id=0, num_hidden_layers=6,
    layer_types=LAYERS * 3, num_kv_shared_layers=2,
)  # fmt: skip
KINDS = {"gemma3n_text": dict(laurel_rank=8), "gemma4_text": dict(global_head_dim=32)}
EXACT = dict(window=128, dtype="float32")
EIGHT = dict(key_bits=8, value_bits=8, window=8, dtype="float32")

pytestmark = [
    pytest.mark.filterwarnings("ignore:TurboQuantCache compresses .* layers:UserWarning"),
    pytest.mark.skipif(VERSION < SHARES_IN_A_PASS, reason="transformers shares keys and values otherwise"),
]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    if request.param not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **SIZES, **KINDS[request.param])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def asked():
    """Two rows, one of which is padded."""
    ids = torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return dict(input_ids=ids, attention_mask=mask)


def run(model, attention, cache, **asked):
    model.set_attn_implementation(attention)
    options = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    out = model.generate(**(options | asked), **given(cache), pad_token_id=0, eos_token_id=None)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("beams", [1, 2])
def test_exact_tokens_inside_the_window(model, asked, beams):
    tokens, logits = run(model, "sdpa", transformers.DynamicCache(config=model.config), **asked, num_beams=beams)
    cache = TurboQuantCache(model.config, **EXACT)
    found, ours = run(model, ATTENTION, cache, **asked, num_beams=beams)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)
    assert cache.compressed_layers == [1, 3]
    assert [i for i, layer in enumerate(cache.layers) if layer.is_initialized and i not in (4, 5)] == [0, 1, 2, 3]


def test_only_the_owners_are_stored(model, asked):
    """Beyond the window: close at 8 bits, and the bytes are those of the owners."""
    expected = run(model, "sdpa", transformers.DynamicCache(config=model.config), **asked, max_new_tokens=1)[1]
    caches = [TurboQuantCache(model.config, **EIGHT | dict(exact_prompt=how)) for how in (True, False)]
    exact, ours = (run(model, ATTENTION, cache, **asked, max_new_tokens=1)[1] for cache in caches)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-4)  # a prompt attends to its keys as they are
    kl = torch.nn.functional.kl_div(*(x.log_softmax(-1) for x in (ours, expected)), log_target=True, reduction="sum")
    assert 0 < kl / 2 < 2e-3
    both = [layer for layer in caches[1].layers if isinstance(layer, CompressedLayer)]
    assert len(both) == 2 and all(layer.cache.compressed == (60 - 7 - 4 - 8, 60 - 4 - 8) for layer in both)


def test_the_sharing_layers_read_the_codes(model, asked):
    """Coarse codes of the owner change the result of a layer that shares them."""
    module = model.model.layers[5].self_attn
    seen = []
    hook = module.o_proj.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    for bits in (8, 1):
        cache = TurboQuantCache(model.config, **EIGHT | dict(key_bits=bits, value_bits=bits, exact_prompt=False))
        run(model, ATTENTION, cache, **asked, max_new_tokens=1)
    hook.remove()
    assert (seen[0] - seen[1]).abs().max() > 0.05


def test_several_logits_of_a_chunk(model, asked):
    """Gemma 4 computes its sharing layers for the tokens whose logits are wanted only."""
    ids, whole = asked["input_ids"], []
    for attention in ("sdpa", ATTENTION):
        model.set_attn_implementation(attention)
        cache = TurboQuantCache(model.config, **EXACT) if attention == ATTENTION else None
        cache = cache or transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            first = model(ids[:, :40], **given(cache), logits_to_keep=3).logits
            whole.append(torch.cat([first, model(ids[:, 40:], **given(cache), logits_to_keep=5).logits], 1))
    torch.testing.assert_close(whole[1], whole[0], rtol=0, atol=1e-4)


def test_which_layers_share_is_said(model):
    cache = TurboQuantCache(model.config)
    assert cache.kept_layers == {
        0: "keeps the latest tokens of its sliding window only",
        2: "keeps the latest tokens of its sliding window only",
        4: "attends over the keys and values of layer 2",
        5: "attends over the keys and values of layer 3",
    }
    assert "compresses 2 of 6 layers [1, 3] to K4/V4; not layers [0, 2]: each keeps the latest" in cache.summary()


def test_shared_layers_on_one_device(model):
    layer = TurboQuantCache(model.config).layers[1]
    keys, _ = layer.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32))
    assert keys.to(torch.device("cpu"), non_blocking=True) is keys
    with pytest.raises(NotImplementedError, match="share keys and values of a TurboQuantCache run on one device, got"):
        keys.to(torch.device("meta"))
