"""Texts that outgrow the room of a cache, and models that discard their cache when a text becomes long."""

import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fake_quant_hf import given  # noqa: E402
from tiny_hf import tiny  # noqa: E402

from interop.hf import ATTENTION, TurboQuantCache  # noqa: E402
from interop.hf.cache import DISCARDING, discarded_above  # noqa: E402

GREEDY = dict(do_sample=False, pad_token_id=0)


def random_ids(count, rows=1):
    return torch.randint(3, 199, (rows, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("prompt", "max_tokens"), [(30, None), (300, None), (20, 24)])
def test_full_precision_grows(prompt, max_tokens):
    """What is not compressed is what DynamicCache gives, however long the text becomes."""
    ids = random_ids(prompt, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = dict(GREEDY, attention_mask=mask, max_new_tokens=24 if max_tokens else 290)
    model = tiny(num_hidden_layers=1, max_position_embeddings=1024, attention="sdpa")
    right = model.generate(ids, **options)
    model.set_attn_implementation(ATTENTION)
    cache = TurboQuantCache(model.config, key=None, value=None, dtype="float32", max_tokens=max_tokens)
    assert torch.equal(model.generate(ids, **given(cache), **options), right)
    more = torch.cat([right, random_ids(9, rows=2)], 1)  # another turn on the same cache
    whole = torch.cat([mask, torch.ones(2, more.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
    options |= {"attention_mask": whole, "max_new_tokens": 9}
    found = model.generate(more, **given(cache), **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(found, model.generate(more, **options))


def long_phi(**options):
    factors = [1.0 + i / 8 for i in range(16)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16, "long_factor": factors}
    rope |= {"original_max_position_embeddings": 48}
    return tiny("Phi3", original_max_position_embeddings=48, rope_parameters=rope, hidden_size=128, **options)


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 names the scaling otherwise"
)
def test_models_that_discard_their_cache_say_so_and_how_to_keep_it():
    model, ids = long_phi(), random_ids(80)
    options = dict(GREEDY, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    right = model.generate(ids, **options)
    with pytest.warns(UserWarning, match="discards its cache when a text passes 48 tokens"):
        cache = TurboQuantCache(model.config, key_bits=8, value_bits=8, dtype="float32")
    assert torch.equal(model.generate(ids, **given(cache), **options), right) and cache.nbytes == 0
    model(ids[:, :-1], **given(cache), use_cache=True, logits_to_keep=1)  # as the warning says
    assert torch.equal(model.generate(ids, **given(cache), **options), right)
    assert cache.get_seq_length() == 80 + 11 and cache.nbytes > 0


@pytest.mark.parametrize("kind", DISCARDING)
def test_which_models_discard_their_cache(kind):
    config = transformers.CONFIG_MAPPING[kind](original_max_position_embeddings=4096, max_position_embeddings=131072)
    assert discarded_above(config) == 4096
    config.max_position_embeddings = 4096
    assert discarded_above(config) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TurboQuantCache(tiny().config)
