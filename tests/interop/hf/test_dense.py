"""A cache that stores compressed and returns tensors: `TurboQuantCache(..., dense=True)`."""

import weakref

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fake_quant_hf import fake_quant_cache, given  # noqa: E402
from tiny_hf import tiny  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.hf import ATTENTION, TurboQuantCache  # noqa: E402
from interop.hf.layer import layer_bytes  # noqa: E402

D = 32
TWO = tq.QuantizerSpec(D, 2)  # coarse, so that tokens depend on it
OPTIONS = dict(key=TWO, value=TWO, window=16, page_size=16, dtype="float32", smooth_keys=False)
SPEC = tq.CacheSpec(2, D, 128, **OPTIONS)
SIZES = dict(
    vocab_size=199, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.08, bos_token_id=1,
    eos_token_id=None, pad_token_id=0,
)  # fmt: skip
OUTSIDE = {
    "bloom": dict(n_layer=2, n_head=2),
    "falcon": dict(alibi=True),
    "gpt_neo": dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=16),
    "xglm": dict(d_model=64, attention_heads=2, num_layers=2, ffn_dim=64, max_position_embeddings=512),
}
"""Models whose attention does not go through AttentionInterface."""

pytestmark = pytest.mark.filterwarnings("ignore:TurboQuantCache.dense=True. saves storage only:UserWarning")


@pytest.fixture(scope="module")
def stock():
    return tiny(attention="sdpa")


@pytest.fixture(scope="module")
def asked():
    """Two rows, one of which is padded."""
    ids = torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    return dict(input_ids=ids, attention_mask=mask)


def run(model, cache, **asked):
    options = dict(max_new_tokens=10, do_sample=False, return_dict_in_generate=True, output_logits=True)
    out = model.generate(**(options | asked), **given(cache), pad_token_id=0)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize(("attention", "beams"), [("sdpa", 1), ("sdpa", 3), ("eager", 1), (ATTENTION, 1)])
def test_attention_over_what_is_stored(asked, attention, beams):
    """Any attention function over the dense cache, against stock attention over decoded codes."""
    model = tiny(attention=attention)
    cache = TurboQuantCache(model.config, max_tokens=128, dense=True, **OPTIONS)
    ours, found = run(model, cache, **asked, num_beams=beams)
    model.set_attn_implementation("eager" if attention == "eager" else "sdpa")  # padding, which is stored, differs
    theirs, expected = run(model, fake_quant_cache(model.config, SPEC), **asked, num_beams=beams)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", OUTSIDE)
def test_models_outside_the_interface(kind, asked):
    """The tokens and logits of DynamicCache inside the window, and close to them at 8 bits beyond it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | OUTSIDE[kind]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NotImplementedError, match="AttentionInterface, got .* or dense=True, which saves storage only"):
        TurboQuantCache(config)
    tokens, logits = run(model, transformers.DynamicCache(config=config), **asked)
    wide = TurboQuantCache(config, dense=True, window=128, dtype="float32")
    found, ours = run(model, wide, **asked)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
    eight = TurboQuantCache(config, dense=True, key_bits=8, value_bits=8, window=8, dtype="float32")
    ours = run(model, eight, **asked)[1][:2].log_softmax(-1)
    kl = torch.nn.functional.kl_div(ours, logits[:2].log_softmax(-1), log_target=True, reduction="sum") / 4
    assert 0 < kl < 1e-3


def test_no_other_copy_stays_alive(stock, asked):
    """What a layer returns is gone when the pass is over, and all bytes of the cache are those of its pages."""
    cache, returned = TurboQuantCache(stock.config, dense=True, dtype="float32", window=16), []
    for layer in cache.layers:

        def update(*args, _update=layer.update, **options):
            found = _update(*args, **options)
            returned.extend(weakref.ref(x) for x in found)
            return found

        layer.update = update
    run(stock, cache, **asked, max_new_tokens=4)
    assert len(returned) == 2 * 2 * 4 and not any(x() is not None for x in returned)
    assert cache.nbytes == sum(layer.cache.nbytes for layer in cache.layers)
    held = sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor))
    assert held == 0 and cache.nbytes == sum(layer_bytes(layer) for layer in cache.layers)


def test_the_cost_is_said(stock):
    with pytest.warns(UserWarning, match="saves storage only: every forward pass decompresses all keys and values"):
        TurboQuantCache(stock.config, dense=True)


def test_what_is_refused(stock, asked):
    with pytest.raises(
        NotImplementedError, match="which a dense cache does not see, got dense=True and smooth_keys=Tr"
    ):
        TurboQuantCache(stock.config, dense=True, smooth_keys=True)
    with pytest.raises(TypeError, match="with dense=True the cache gives other attention functions tensors"):
        stock(**asked, **given(TurboQuantCache(stock.config)))
    cache = TurboQuantCache(stock.config, dense=True)
    with torch.no_grad():
        stock(asked["input_ids"], **given(cache))
    for parameter in stock.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(NotImplementedError, match="a compressed cache is for inference, got a gradient"):
        stock(asked["input_ids"][:, :1], **given(cache)).logits.sum().backward()


def test_prompts_that_read_their_codes(stock, asked):
    """A prompt in one chunk or several gives the same, if it attends to what the cache holds of it."""
    found = []
    for cuts in ([60], [7, 33, 20]):
        cache = TurboQuantCache(
            stock.config, dense=True, exact_prompt=False, window=0, center_keys=False, key_bits=3, value_bits=3
        )
        with torch.no_grad():
            parts = [stock(part, **given(cache)).logits for part in asked["input_ids"].split(cuts, dim=1)]
        found.append(torch.cat(parts, 1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
