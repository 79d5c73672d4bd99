"""A cache after a forward pass that did not end, and after it was emptied."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from fake_quant_hf import given  # noqa: E402
from tiny_hf import tiny  # noqa: E402

from interop.hf import TurboQuantCache  # noqa: E402
from interop.hf.layer import VERSION  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402

GREEDY = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def model():
    return tiny(num_hidden_layers=3)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(1))


def interrupt(*_):
    raise KeyboardInterrupt


def run_until(layer, run):
    """Runs the model until it comes to a layer."""
    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    hook.remove()


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("tokens", [60, 41, 46])
def test_layers_of_different_lengths_are_noticed(model, ids, stop, tokens):
    """A chunk, and one token, whose mask is None; what all layers hold can be kept."""
    expected, cache = model.generate(ids[:1, :tokens], **GREEDY), TurboQuantCache(model.config)
    model.generate(ids[:1, :40], **given(cache), **(GREEDY | dict(max_new_tokens=1)))
    run_until(model.model.layers[stop], lambda: model.generate(ids[:1, :tokens], **given(cache), **GREEDY))
    for _ in range(2):
        message = rf"interrupted forward pass has left, 40 to {tokens} tokens .* layer.crop\(40\)` keeps"
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            model(ids[:1, -1:], **given(cache))
    for layer in cache.layers:
        layer.crop(40)
    assert torch.equal(model.generate(ids[:1, :tokens], **given(cache), **GREEDY), expected)


@pytest.mark.skipif(VERSION < (5, 0), reason="generate of transformers 4 stops at such a cache by itself")
def test_an_interrupted_prompt_leaves_nothing_to_keep(model, ids):
    expected, cache = model.generate(ids, **GREEDY), TurboQuantCache(model.config)
    run_until(model.model.layers[1], lambda: model.generate(ids, **given(cache), **GREEDY))
    with pytest.raises(RuntimeError, match=r"left, 0 to 60 tokens in its layers: `cache.reset\(\)` empties it"):
        model.generate(ids, **given(cache), **GREEDY)
    cache.reset()
    assert torch.equal(model.generate(ids, **given(cache), **GREEDY), expected)


def test_an_append_that_did_not_end_is_noticed(model, ids, monkeypatch):
    cache = TurboQuantCache(model.config)
    with torch.no_grad():
        model(ids, **given(cache))
    append = TorchCache.extend

    def extend(self, *args, **options):
        append(self, *args, **options)
        interrupt()

    monkeypatch.setattr(TorchCache, "extend", extend)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(ids[:, :1], **given(cache))
    monkeypatch.undo()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"has left: empty the cache by `cache.reset\(\)`"):
        model(ids[:, :1], **given(cache))


@pytest.mark.parametrize("statistics", [False, True])
def test_an_emptied_cache_takes_any_batch(model, ids, statistics):
    """As DynamicCache does; with the statistics of the new prompt."""
    cache = TurboQuantCache(model.config)
    if statistics:
        for layer in cache.layers:
            layer.statistics = torch.zeros(2, 32).numpy(), torch.ones(2, 32).numpy()
    for batch in (ids[:1], ids, ids[:1], torch.cat([ids, ids])[:3]):
        cache.reset()
        expected = model.generate(batch, **GREEDY)
        assert torch.equal(model.generate(batch, **given(cache), **GREEDY), expected)
        assert all(layer.cache.rows == len(batch) for layer in cache.layers)
    kept = cache.layers[0].cache
    cache.reset()
    model.generate(batch, **given(cache), **GREEDY)
    assert (cache.layers[0].cache is kept) is not statistics
