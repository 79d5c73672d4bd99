import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fake_quant_hf import fake_quant_cache, given  # noqa: E402
from tiny_hf import tiny  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.hf import ATTENTION, CompressedLayer, TurboQuantCache  # noqa: E402
from interop.hf.attention import compressed_attention  # noqa: E402
from interop.hf.layer import VERSION  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402

D, NEW = 32, 10
TWO = tq.QuantizerSpec(D, 2)  # coarse, so that tokens depend on it
OPTIONS = dict(key=TWO, value=TWO, window=16, page_size=16, dtype="float32", smooth_keys=False)
SPEC = tq.CacheSpec(2, D, 128, **OPTIONS)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def stock():
    return tiny(attention="sdpa")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(1))


def compressed(model, **options) -> TurboQuantCache:
    return TurboQuantCache(model.config, **(dict(max_tokens=128) | OPTIONS | options))


def both(model, stock, ids, *, pads=None, **options):
    """The same generation with the compressed cache and with the oracle."""
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads or []):
        mask[row, :pad] = 0
    options = dict(attention_mask=mask, max_new_tokens=NEW, pad_token_id=0) | options
    found = []
    for which, cache in ((model, compressed(model)), (stock, fake_quant_cache(stock.config, SPEC, pads))):
        torch.manual_seed(7)
        found.append(which.generate(ids, **given(cache), **options))
    return found


MODES = {
    "greedy": dict(do_sample=False),
    "beams": dict(do_sample=False, num_beams=3),
    "sampling": dict(do_sample=True, top_k=50, temperature=0.8, num_return_sequences=2),
}


@pytest.mark.parametrize("mode", MODES)
def test_left_padded_batches(model, stock, ids, mode):
    ours, theirs = both(model, stock, ids, pads=[13, 0], **MODES[mode])
    assert torch.equal(ours, theirs)


def test_compression_matters_here(stock, ids):
    """The oracle's tokens are not those of an exact cache, so that to equal them means something."""
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    exact = stock.generate(ids, **options)
    assert not torch.equal(exact, stock.generate(ids, **given(fake_quant_cache(stock.config, SPEC)), **options))


def test_chat_turns_on_one_cache_and_forks(model, stock, ids):
    """Later turns attend to the cache; a fork goes its own way."""
    caches = compressed(model), fake_quant_cache(stock.config, SPEC)
    histories = [ids[:1, :40], ids[:1, :40]]
    for turn in range(3):
        for i, which in enumerate((model, stock)):
            out = which.generate(histories[i], **given(caches[i]), max_new_tokens=5, do_sample=False)
            histories[i] = torch.cat([out, ids[1:, 20 * turn : 20 * turn + 7]], 1)
        assert torch.equal(*histories)
        assert caches[0].get_seq_length() == histories[0].shape[1] - 8
    fork = copy.deepcopy(caches[0])
    outs = [model.generate(histories[0], **given(c), max_new_tokens=4, do_sample=False) for c in (caches[0], fork)]
    assert torch.equal(*outs)


def test_assisted_decoding(model, stock, ids):
    """Candidates are appended, judged and cropped."""
    prompt = torch.cat([ids[:1, :15]] * 4, 1)
    options = dict(do_sample=False, prompt_lookup_num_tokens=3, max_matching_ngram_size=2, eos_token_id=198)
    ours, theirs = both(model, stock, prompt, **options)
    assert torch.equal(ours, theirs)


def test_growing_and_smoothing_with_the_models_queries(ids):
    """Nothing reserved, smoothed keys: as tq_jax gives from the same keys, values and queries."""
    model = tiny()
    cache = TurboQuantCache(model.config, max_tokens=20, **(OPTIONS | dict(smooth_keys=True, window=8)))
    model.generate(ids[:1], **given(cache), max_new_tokens=20, do_sample=False)
    layer = cache.layers[1]
    assert layer.cache.spec.max_tokens >= 79 == layer.cache.lengths[0] == cache.get_seq_length()
    statistics = layer.cache.arrays.statistics
    assert bool(statistics.ready.all()) and float(statistics.query_count[0]) == 60
    assert float((statistics.weight - 1).abs().max()) > 0.01


def test_sliding_layers_stay_as_they_are(ids):
    """A hybrid: the full-attention layer is compressed, the sliding one is not, and the cache says so."""
    kind = dict(sliding_window=12, layer_types=["sliding_attention", "full_attention"], use_sliding_window=True)
    ours, theirs = tiny("Qwen3", **kind), tiny("Qwen3", attention="sdpa", **kind)
    with pytest.warns(
        UserWarning, match=r"compresses 1 of 2 layers \[1\] to K2/V2; not layers \[0\]: each keeps the latest"
    ):
        cache = TurboQuantCache(ours.config, max_tokens=128, **OPTIONS)
    options = dict(max_new_tokens=NEW, do_sample=False)
    found = ours.generate(ids, **given(cache), **options)
    assert torch.equal(found, theirs.generate(ids, **given(fake_quant_cache(theirs.config, SPEC)), **options))
    assert cache.nbytes > cache.layers[1].cache.nbytes


@pytest.mark.parametrize("kind", ["GptOss", "Gemma2"])
def test_sinks_and_softcaps_are_honoured(kind, ids):
    """The eager attention of these models over an exact cache, against a cache of nothing but window."""
    options = dict(layer_types=["full_attention", "full_attention"])
    if kind == "GptOss":
        options |= dict(num_local_experts=2, num_experts_per_tok=1)
    else:
        options |= dict(attn_logit_softcapping=0.5, query_pre_attn_scalar=40)
    ours, theirs = tiny(kind, **options), tiny(kind, attention="eager", **options)
    if kind == "GptOss":
        for which in (ours, theirs):
            for layer in which.model.layers:
                layer.self_attn.sinks.data = torch.linspace(-1, 3, 4)
    wide = TurboQuantCache(ours.config, **(OPTIONS | dict(window=128)))
    with torch.no_grad():
        for which, cache in ((ours, wide), (theirs, transformers.DynamicCache(config=theirs.config))):
            which.first = which(ids[:1, :30], **given(cache)).logits
            which.then = which(ids[:1, 30:33], **given(cache)).logits
    torch.testing.assert_close(ours.first, theirs.first, rtol=0, atol=2e-4)
    torch.testing.assert_close(ours.then, theirs.then, rtol=0, atol=2e-4)


def test_operations_on_layers(model, ids):
    cache = compressed(model)
    with torch.no_grad():
        model(ids, **given(cache))
        one = compressed(model)
        model(ids[1:], **given(one))
    layer = cache.layers[0]
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 0]))
    layer.reorder_cache(torch.tensor([0, 0]))
    layer.crop(-4)
    one.layers[0].crop(-4)
    assert layer.get_seq_length() == 56 and layer.cache.lengths == (56, 56)
    query = torch.ones(2, 1, 4, D)
    torch.testing.assert_close(layer.cache.attend(query)[1:], one.layers[0].cache.attend(query[:1]), rtol=0, atol=1e-6)
    cache.reset()
    assert cache.get_seq_length() == 0 and layer.cache.lengths == (0, 0)
    with pytest.raises(NotImplementedError, match="stays on its device"):
        layer.offload()


def test_a_graph_of_a_model_is_refused(model, ids, monkeypatch):
    cache = compressed(model)
    with torch.no_grad():
        model(ids, **given(cache))
        monkeypatch.setattr(TorchCache, "is_capturing", True)
        with pytest.raises(NotImplementedError, match="a CUDA graph of a model over a TurboQuantCache: masks are read"):
            model(ids[:, :1], **given(cache))


def test_bytes_per_token():
    """K4/V4 at head dim 64, the least favourable that is common: below .28 of bfloat16, allocated memory compared."""
    layer = CompressedLayer(TurboQuantCache(tiny().config).layers[0].compression)
    sizes = []
    for count in (1024, 3072):
        layer.cache, layer.seen = None, 0
        tokens = torch.zeros(1, 3, count, 64, dtype=torch.bfloat16)
        layer._make_room(tokens)
        sizes.append((layer.cache.nbytes, layer.cache.spec.max_tokens))
    (small, few), (large, many) = sizes
    assert (large - small) / (many - few) / (2 * 2 * 3 * 64) < 0.28


def test_other_attention_functions_are_told(ids):
    for attention in ("sdpa", "eager"):
        stock = tiny(attention=attention)
        with pytest.raises(TypeError, match="expected attn_implementation='tq_jax' with a TurboQuantCache"):
            stock(ids, **given(TurboQuantCache(stock.config)))


def test_a_stock_cache_keeps_working(model, stock, ids):
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


def test_what_is_refused(model, ids):
    layer = TurboQuantCache(model.config, **OPTIONS).layers[0]
    module, q, k = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, D), torch.zeros(1, 2, 3, D)
    keys, values = layer.update(k, k)

    def call(mask=None, **options):
        compressed_attention(module, q, keys, values, mask, **options)

    causal = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    heads, narrow = causal.expand(1, 4, 3, 3), k[..., :16]
    biased = torch.zeros(1, 1, 3, 3).masked_fill(~causal, -1e9) - 0.5
    cases = [
        (NotImplementedError, "does not know position_bias=torch.float32", lambda: call(position_bias=torch.zeros(1))),
        (NotImplementedError, "does not know cu_seq_lens_q=3", lambda: call(cu_seq_lens_q=3)),
        (NotImplementedError, "for inference, got dropout=0.1", lambda: call(dropout=0.1)),
        (NotImplementedError, "compressed layers see all tokens, got sliding_window=2", lambda: call(sliding_window=2)),
        (NotImplementedError, "does not know biases", lambda: call(biased)),
        (NotImplementedError, "expected a causal mask with padding", lambda: call(causal.triu())),
        (NotImplementedError, "a mask of bool or floating point, got torch.int64", lambda: call(causal.long())),
        (NotImplementedError, r"expected a mask \[1, 1, 3, 3\], got \[1, 4, 3, 3\]", lambda: call(heads)),
        (NotImplementedError, r"of one shape .*\[1, 2, 3, 32\] and \[1, 2, 3, 16\]", lambda: layer.update(k, narrow)),
    ]  # fmt: skip
    for error, message, run in cases:
        with pytest.raises(error, match=message):
            run()
    assert layer.seen == 0
    sliding = transformers.MistralConfig(num_hidden_layers=2, sliding_window=8)
    with pytest.raises(ValueError, match=r"a model with full-attention layers, got \['DynamicSlidingWindowLayer'\]"):
        TurboQuantCache(sliding)


def test_a_forgotten_mask_is_noticed(model, ids):
    cache, mask = compressed(model), torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, **given(cache))
        with pytest.raises(ValueError, match="expected the attention mask of the first 60 tokens to be as before"):
            model(ids[:, :1], **given(cache))


def test_prompts_that_read_their_codes(model, ids):
    """Without exact prompts, window and centring, logits do not depend on how a prompt is cut into chunks."""

    def logits(cuts, **options):
        cache = compressed(model, window=0, center_keys=False, **options)
        with torch.no_grad():
            return torch.cat([model(part, **given(cache)).logits for part in ids.split(cuts, dim=1)], 1)

    whole = logits([60], exact_prompt=False)
    torch.testing.assert_close(logits([7, 33, 20], exact_prompt=False), whole, rtol=0, atol=1e-4)
    assert (logits([60]) - whole).abs().max() > 0.1


def test_options_are_looked_at_first(model):
    cases = [
        (TypeError, r"expected options among \['key_bits', .*'window', .*\], got windw", dict(windw=3)),
        (TypeError, r"expected options among .*, got num_kv_heads", dict(num_kv_heads=2)),
        (TypeError, r"expected options among .*, got sliding_window", dict(sliding_window=64)),
        (NotImplementedError, "has bits in .*, got bits=7", dict(key_bits=7)),
        (ValueError, "expected max_tokens of at least 1, got 0", dict(max_tokens=0)),
        (ValueError, "expected a value spec of dim 64", dict(key=tq.QuantizerSpec(64), value=TWO)),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            TurboQuantCache(model.config, **options)
    with pytest.raises(ValueError, match=r"expected a config, got LlamaForCausalLM: pass model.config"):
        TurboQuantCache(model)
    with pytest.raises(ValueError, match="expected a config, got dict$"):
        TurboQuantCache({})
    whole = TurboQuantCache(model.config, key=TWO, value_bits=8)
    assert whole.summary() == "TurboQuantCache compresses 2 of 2 layers [0, 1] to K2/V8"
    assert "to full precision" in TurboQuantCache(model.config, key=None, value=None).summary()


def test_a_short_description(model, ids):
    cache = compressed(model)
    assert repr(cache) == "TurboQuantCache(K2/V2 in 2 of 2 layers, 0 tokens, 0.00 MB)"
    with torch.no_grad():
        model(ids, **given(cache))
    assert repr(cache) == f"TurboQuantCache(K2/V2 in 2 of 2 layers, 60 tokens, {cache.nbytes / 1e6:.2f} MB)"


def test_a_gradient_through_the_cache_is_refused(ids):
    """A prompt attends to itself as it is, so it has one; what comes later would lack that of stored tokens."""
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name)
    cache = compressed(model)
    model(ids, **given(cache)).logits.sum().backward()
    assert float(model.model.layers[0].self_attn.k_proj.weight.grad.abs().max()) > 0
    later = model(ids[:, :1], **given(cache)).logits
    with pytest.raises(NotImplementedError, match="a compressed cache is for inference, got a gradient to pass back"):
        later.sum().backward()


def test_a_pickled_cache_goes_on(model, ids):
    cache, mask = compressed(model), torch.ones(2, 63, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask[:, :60], **given(cache))
        other = pickle.loads(pickle.dumps(cache))
        found = [model(ids[:, :3], attention_mask=mask, **given(each)).logits for each in (other, cache)]
    assert torch.equal(*found)


def test_a_static_cache_with_sinks(ids):
    """Its prompt comes without a mask, and with keys behind it that are yet to come."""
    kind = dict(layer_types=["full_attention", "full_attention"], num_local_experts=2, num_experts_per_tok=1)
    options = dict(max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    found = [tiny("GptOss", attention=name, **kind).generate(ids, **options) for name in (ATTENTION, "eager")]
    assert torch.equal(*found)


@pytest.mark.slow
def test_a_compiled_model(ids):
    """Attention breaks the graph, and gives what it gives without."""
    torch.manual_seed(0)
    model, found = tiny(), []
    with torch.no_grad():
        for forward in (model, torch.compile(model, backend="eager")):
            cache = compressed(model)
            found.append(torch.cat([forward(part, **given(cache)).logits for part in ids.split([50, 10], dim=1)], 1))
    assert torch.equal(*found)


@pytest.mark.skipif(VERSION < (5, 0), reason="such layers need transformers 5")
def test_bytes_of_linear_attention(ids):
    """Their states lie in dicts."""
    kind = dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2, linear_num_key_heads=1)
    kind |= dict(linear_key_head_dim=16, linear_value_head_dim=16, num_experts=2, num_experts_per_tok=1)
    model = tiny("Qwen3Next", moe_intermediate_size=32, shared_expert_intermediate_size=32, **kind)
    with pytest.warns(UserWarning, match="compresses 1 of 2 layers"):
        cache = compressed(model)
    with torch.no_grad():
        model(ids, **given(cache))
    state = cache.layers[0].recurrent_states[0]
    assert cache.nbytes >= cache.layers[1].cache.nbytes + state.nbytes > cache.layers[1].cache.nbytes
