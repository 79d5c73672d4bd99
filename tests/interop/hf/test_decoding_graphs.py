"""Decoding steps of a model as graphs: here a replay is the captured function run anew, its kernels interpreted."""

import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from fake_quant_hf import given  # noqa: E402
from interpreted import Replayed  # noqa: E402
from tiny_hf import tiny  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.hf import CACHE_ARGUMENT, TurboQuantCache  # noqa: E402
from interop.hf import decoding_graphs as graphs_module  # noqa: E402
from interop.hf.decoding_graphs import decoding_graphs  # noqa: E402
from interop.torch import kernels as cache_kernels  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402

D = 64
TWO = tq.QuantizerSpec(D, 2)  # coarse, so that tokens depend on it
OPTIONS = dict(key=TWO, value=TWO, window=16, page_size=32, dtype="float32")
HEADS = dict(head_dim=D, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def model():
    return tiny(**HEADS)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 199, (2, 40), generator=torch.Generator().manual_seed(1))


def compressed(model, **options):
    return TurboQuantCache(model.config, **(OPTIONS | options))


@pytest.fixture
def captures(monkeypatch, interpreted):
    """This machine as a GPU; gets the arguments of each step of a model that is captured."""
    made, replaying, captured = [], [], graphs_module._captured

    class Step(Replayed):
        def __init__(self, function, examples, pool):
            super().__init__(function, examples, pool)
            made.append([tuple(x.shape) for x in examples])

        def replay(self, tensors):
            replaying.append(True)
            with captured(layers[0]):
                super().replay(tensors)
            replaying.pop()

    layers = []
    monkeypatch.setattr(graphs_module, "_captured", lambda given: layers.insert(0, given) or captured(given))
    monkeypatch.setattr(graphs_module, "TensorGraph", Step)
    monkeypatch.setattr(cache_kernels, "TensorGraph", Replayed)
    monkeypatch.setattr(graphs_module, "_require_one_gpu", lambda model: None)
    monkeypatch.setattr(TorchCache, "on_gpu", True)
    monkeypatch.setattr(TorchCache, "is_capturing", property(lambda cache: bool(replaying)))
    return made


def counters(cache):
    layers = [(layer.seen, layer.cache.lengths, layer.cache.compressed) for layer in cache.layers]
    on_device = [tuple(layer.cache.arrays.length.tolist()) for layer in cache.layers]
    assert on_device == [lengths for _, lengths, _ in layers]
    return layers


@pytest.mark.parametrize("pads", [(0, 0), (0, 7)])
@pytest.mark.parametrize("beams", [1, 2])
def test_generating_is_the_same(captures, model, ids, pads, beams):
    """Rows of other lengths too, and beams, which are reordered."""
    mask = torch.ones_like(ids)
    mask[1, : pads[1]] = 0
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
    caches = [compressed(model, max_tokens=48) for _ in range(2)]
    want = model.generate(ids, **given(caches[0]), **options)
    with decoding_graphs(model, caches[1]):
        found = model.generate(ids, **given(caches[1]), **options)
    assert torch.equal(found, want) and "forward" not in vars(model)
    assert counters(caches[1]) == counters(caches[0])
    assert len(captures) == 1 and (2 * beams, 1) in captures[0]


def test_a_cache_that_grows_is_captured_anew(captures, model, ids):
    caches = [compressed(model, max_tokens=44) for _ in range(2)]
    logits = []
    with torch.no_grad(), decoding_graphs(model, caches[0]):
        for cache in caches:
            model(ids, **given(cache))
            parts = [model(ids[:, i : i + 1], **given(cache)).logits for i in range(9)]
            logits.append(torch.cat(parts, 1))
    assert torch.equal(*logits) and len(captures) == 2
    assert counters(caches[0]) == counters(caches[1])


def test_what_runs_as_outside(captures, model, ids):
    """Prompts, chunks, gradients, other caches and masks that hide more."""
    cache, other = compressed(model), compressed(model)
    token = ids[:, :1]
    with decoding_graphs(model, cache):
        with torch.no_grad():
            for each in (cache, other):
                model(ids, **given(each))
                model(ids[:, :3], **given(each))
            for _ in range(3):
                model(token, **given(other))
            mask = torch.ones(2, 44, dtype=torch.int64)
            mask[1, 3] = 0
            with pytest.raises(ValueError, match="expected the attention mask of the first 43 tokens to be as before"):
                model(token, attention_mask=mask, **given(cache))
        model(token, **given(cache))
        assert not captures
        with torch.no_grad():
            outputs = [model(token, **given(cache), output_hidden_states=True) for _ in range(3)]
    assert len(captures) == 1 and all(len(out.hidden_states) == 3 for out in outputs)
    assert not torch.equal(outputs[1].logits, outputs[2].logits), "results are the caller's"


def test_what_is_refused(captures, model, ids, monkeypatch):
    mixed = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=24, use_sliding_window=True)
    sliding = tiny("Qwen2", **HEADS, **mixed)
    with pytest.warns(UserWarning, match="compresses 1 of 2 layers"):
        cache = compressed(sliding)
    refused = pytest.raises(
        NotImplementedError,
        match="need a cache whose every layer is compressed and has no other state, got TurboQuantCache",
    )
    with refused, decoding_graphs(sliding, cache):
        pass
    with pytest.warns(UserWarning, match="saves storage only"):
        dense = compressed(model, dense=True)
    refused = pytest.raises(NotImplementedError, match="attention that reads the codes, got a cache with dense=True")
    with refused, decoding_graphs(model, dense):
        pass
    cache, forward = compressed(model), type(model).forward

    @functools.wraps(forward)
    def reading(self, *given, **named):
        named[CACHE_ARGUMENT].get_seq_length()
        return forward(self, *given, **named)

    monkeypatch.setattr(type(model), "forward", reading)
    with torch.no_grad(), decoding_graphs(model, cache):
        model(ids, **given(cache))
        model(ids[:, :1], **given(cache))
        with pytest.raises(NotImplementedError, match="a model that reads the number of tokens on the host"):
            model(ids[:, :1], **given(cache))


def test_a_model_on_a_cpu_is_refused(model):
    refused = pytest.raises(NotImplementedError, match=r"CUDA graphs need a model on one GPU, got \['cpu'\]")
    with refused, decoding_graphs(model, compressed(model)):
        pass
