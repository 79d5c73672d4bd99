import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from fake_quant_hf import given  # noqa: E402
from tiny_hf import tiny  # noqa: E402

from interop.hf import TurboQuantCache  # noqa: E402
from interop.hf.attention import compressed_attention, real_tokens  # noqa: E402
from interop.hf.layer import VERSION  # noqa: E402

D = 32


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tensors():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 6, D, generator=random) for heads in (4, 2, 2)]


def reference(query, key, value, seen, *, softcap=None, scaling=None):
    """Attention [b, t, h_q, d] written out; `seen` says which keys a query sees, or is added to the logits."""
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    logits = query @ key.mT * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen
    return (logits.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("says", ["call", "layer", "nobody", "mask"])
def test_tensors_have_their_own_causality(model, tensors, says, softcap):
    """Encoders of images, cross-attention, stock caches: the cache knows nothing of these keys."""
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    if says == "layer":
        module.is_causal = False
    everything = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    block = everything.tril() | (everything & (torch.arange(6) < 4))
    mask = block if says == "mask" else None
    options = {"call": dict(is_causal=False), "mask": dict(is_causal=True)}.get(says, {})
    seen = {"nobody": everything.tril(), "mask": block}.get(says, everything)
    found, weights = compressed_attention(module, *tensors, mask, softcap=softcap, scaling=0.3, **options)
    assert weights is None
    torch.testing.assert_close(found, reference(*tensors, seen, softcap=softcap, scaling=0.3), rtol=0, atol=1e-6)


def test_tensors_have_biases_and_dropout_by_sdpa(tensors, monkeypatch):
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    bias = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    options = dict(position_bias=bias, is_causal=False, cu_seq_lens_q=None)
    if VERSION >= (5, 0):
        found = compressed_attention(module, *tensors, None, **options)[0]
        torch.testing.assert_close(found, reference(*tensors, bias), rtol=0, atol=1e-6)
    monkeypatch.setattr("interop.hf.attention.SDPA_TAKES_BIASES", False)
    with pytest.raises(NotImplementedError, match=r"SDPA of transformers .* ignores position_bias=torch.float32\[2, 4"):
        compressed_attention(module, *tensors, None, **options)
    assert not compressed_attention(module, *tensors, None, dropout=1.0)[0].any()
    for refused in (dict(dropout=0.1), dict(position_bias=bias)):
        with pytest.raises(NotImplementedError, match=f"{next(iter(refused))}|dropout"):
            compressed_attention(module, *tensors, None, softcap=2.0, **refused)


def test_causality_of_a_compressed_layer(tensors):
    """A prompt without a mask may see all of itself; later tokens may not, nor may there be other keys than theirs."""
    model, (query, key, value) = tiny(num_hidden_layers=1), tensors
    module = model.model.layers[0].self_attn
    exact, coded = (TurboQuantCache(model.config, exact_prompt=how).layers[0] for how in (True, False))
    found = compressed_attention(module, query, *exact.update(key, value), None, is_causal=False)[0]
    everything = torch.ones(1, dtype=torch.bool)
    torch.testing.assert_close(found, reference(*tensors, everything), rtol=0, atol=1e-6)
    last = compressed_attention(
        module, query[:, :, :1], *exact.update(key[:, :, :1], value[:, :, :1]), None, is_causal=False
    )
    assert last[0].shape == (2, 1, 4, D) and exact.seen == 7
    for layer in (exact, coded):
        with pytest.raises(NotImplementedError, match=r"causal attention, got is_causal=False \(blocks of tokens"):
            compressed_attention(module, query, *layer.update(key, value), None, is_causal=False)
        with pytest.raises(NotImplementedError, match="got 2 queries and 6 new keys, as in cross-attention"):
            compressed_attention(module, query[:, :, :2], *layer.update(key, value), None)
    assert (exact.seen, coded.seen) == (7, 0)


def test_masks():
    causal = torch.ones(4, 6, dtype=torch.bool).tril(2)[None, None].expand(2, 1, 4, 6)
    assert real_tokens(None, 2, 4, 6) is None and real_tokens(causal, 2, 4, 6) is None
    padded = causal.clone()
    padded[0, :, :, :3] = False
    want = [[False] * 3 + [True] * 3, [True] * 6]
    assert real_tokens(padded, 2, 4, 6).tolist() == want
    additive = torch.zeros(2, 1, 4, 6).masked_fill(~padded, torch.finfo(torch.float32).min)
    assert real_tokens(additive, 2, 4, 6).tolist() == want
    padded[1, :, :, 2] = False
    assert real_tokens(padded, 2, 4, 6)[1].tolist() == [True, True, False, True, True, True]


def test_prompts_may_see_later_tokens():
    """Prefixes and blocks that see all of themselves; still no padding is seen, and nothing causal is hidden."""
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 1, 6, 6)
    kind = torch.tensor([0, 1, 1, 1, 0, 0])
    padded = causal | ((kind[:, None] == 1) & (kind == 1))
    padded = padded & torch.tensor([[True] * 6, [False] + [True] * 5])[:, None, None]
    want = [[True] * 6, [False] + [True] * 5]
    assert real_tokens(padded, 2, 6, 6, may_see_later=True).tolist() == want
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~padded, torch.finfo(torch.float32).min)
    assert real_tokens(additive, 2, 6, 6, may_see_later=True).tolist() == want
    assert real_tokens(torch.ones_like(causal), 2, 6, 6, may_see_later=True) is None
    with pytest.raises(
        NotImplementedError, match="another pattern \\(blocks of tokens that see later ones.*exact_prompt"
    ):
        real_tokens(padded, 2, 6, 6)
    window, sees_padding = causal.triu(-2), padded.clone()
    packed = causal & (kind.cumsum(0)[:, None] == kind.cumsum(0))
    sees_padding[1, 0, 2, 0] = True
    for wrong in (window, packed, sees_padding):
        with pytest.raises(NotImplementedError, match="expected a causal mask with padding, got another pattern$"):
            real_tokens(wrong, 2, 6, 6, may_see_later=True)


def test_a_mask_is_read_anew_for_other_numbers(model):
    """What one layer found holds for layers with as many queries and keys only, and with the same question."""
    mask, layers = torch.ones(1, 1, 3, 5, dtype=torch.bool).tril(2), [object() for _ in range(4)]
    mask[..., 0] = False
    first = real_tokens(mask, 1, 3, 5, asked_by=layers[0])
    assert real_tokens(mask, 1, 3, 5, asked_by=layers[1]) is first
    assert real_tokens(mask, 1, 3, 5, asked_by=layers[2], may_see_later=True) is not first
    for keys in (4, 6):
        with pytest.raises(NotImplementedError, match=rf"expected a mask \[1, 1, 3, {keys}\], got \[1, 1, 3, 5\]"):
            real_tokens(mask, 1, 3, keys, asked_by=layers[3])


def test_masks_in_inference_mode(model, ids):
    """Such tensors do not count what is written to them: the layers of a pass share what was found, a pass does not."""
    mask, layers = torch.ones_like(ids), (object(), object())
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, **given(TurboQuantCache(model.config))).logits
    with torch.inference_mode():
        found = model(ids, attention_mask=mask.clone(), **given(TurboQuantCache(model.config))).logits
        own = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
        own[..., 0] = False
        first = real_tokens(own, 1, 3, 3, asked_by=layers[0])
        assert first.tolist() == [[False, True, True]]
        assert real_tokens(own, 1, 3, 3, asked_by=layers[1]) is first
        own[:, :, 1:, 1] = False
        assert real_tokens(own, 1, 3, 3, asked_by=layers[0]).tolist() == [[False, False, True]]
        assert real_tokens(own, 1, 3, 3).tolist() == [[False, False, True]]
    assert torch.equal(found, expected)
