"""Appending and attending in one call; what a GPU replays as a graph is interpreted here, and measured on one."""

import contextlib
import copy
import pickle

import jax
import pytest

torch = pytest.importorskip("torch")

from interpreted import Replayed  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.launcher.cuda_graph import GraphPool, TensorGraph  # noqa: E402
from interop.torch import kernels  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402

SPEC = tq.CacheSpec(2, 64, 96, tq.QuantizerSpec(64, 4), tq.QuantizerSpec(64, 4), window=10, page_size=32)


def tokens(count, seed):
    """Keys, values and queries of two rows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, count, heads, 64, generator=generator) for heads in (2, 2, 6)]


def both():
    """Two caches alike."""
    caches = [TorchCache(SPEC, 2) for _ in range(2)]
    for cache in caches:
        cache.append(*tokens(40, 0)[:2], lengths=[40, 17])
    return caches


def assert_alike(a, b):
    assert (a.lengths, a.compressed) == (b.lengths, b.compressed) == (tuple(a.arrays.length.tolist()), b.compressed)
    for x, y in zip(jax.tree.leaves(a.arrays), jax.tree.leaves(b.arrays), strict=True):
        assert torch.equal(x, y)


def test_extending_is_appending_and_attending():
    one, two = both()
    for seed, (count, lengths) in enumerate([(1, None), (5, [5, 2]), (1, [0, 1])]):
        k, v, query = tokens(count, seed)
        options = {"lengths": lengths, "softcap": 3.0, "sink_logits": torch.arange(6.0), "scale": 0.2}
        found = one.extend(k, v, query, **options)
        two.append(k, v, query=query, lengths=lengths)
        assert torch.equal(found, two.attend(query, **options))
        assert_alike(one, two)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"softcap": -1.0}, "expected softcap above 0, got -1.0"),
        ({"sink_logits": torch.zeros(5)}, r"expected sink_logits of shape \(6,\), got \(5,\)"),
    ],
)
def test_a_refused_call_appends_nothing(options, error):
    one, two = both()
    with pytest.raises(ValueError, match=error):
        one.extend(*tokens(1, 0), **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        one.extend(*tokens(1, 0), windows=3)
    assert_alike(one, two)


@pytest.fixture
def replayed(monkeypatch, interpreted):
    """Caches of this machine extend as on a GPU, graphs run their function; gets the shapes of each that is made."""
    made = []

    def graph(function, examples, pool):
        made.append(([tuple(x.shape) for x in examples], pool))
        return Replayed(function, examples, pool)

    monkeypatch.setattr(kernels, "TensorGraph", graph)
    monkeypatch.setattr(TorchCache, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_one_token_is_a_graph_from_the_second_on(replayed):
    one, two = both()
    for seed in range(5):
        k, v, query = tokens(1, seed)
        found = one.extend(k, v, query)
        two.append(k, v, query=query)
        assert torch.equal(found, two.attend(query))
        assert_alike(one, two)
        assert len(replayed) == min(seed, 1)
    shapes, pool = replayed[0]
    assert shapes == [(2, 1, 2, 64), (2, 1, 2, 64), (2, 1, 6, 64)] and pool is one._pool
    sinks = {"sink_logits": torch.arange(6.0)}
    for seed in range(2):
        one.extend(*tokens(1, seed), **sinks)
        one.extend(*tokens(3, seed))
    assert [len(shapes) for shapes, _ in replayed] == [3, 4], "sinks are another graph, chunks none"


def test_a_graph_lives_as_long_as_the_tensors(replayed):
    cache = both()[0]
    for seed in range(2):
        cache.extend(*tokens(1, seed))
    cache.reorder([1, 1])
    cache.crop(12)
    assert cache.lengths == tuple(cache.arrays.length.tolist()) == (12, 12)
    assert cache.compressed == tuple(cache.arrays.compressed.tolist())
    cache.extend(*tokens(1, 5))
    assert len(replayed) == 1, "rows were reordered in place"
    cache.reserve(160)
    cache.extend(*tokens(1, 6))
    assert len(replayed) == 1
    cache.extend(*tokens(1, 7))
    assert len(replayed) == 2, "memory has moved"


def test_a_graph_without_room_is_not_replayed(replayed):
    cache = both()[0]
    cache.append(*tokens(56, 1)[:2], lengths=[54, 0])
    for seed in range(2):
        cache.extend(*tokens(1, seed))
    with pytest.raises(ValueError, match=r"expected at most max_tokens=96 tokens per row, got \[97, 20\]"):
        cache.extend(*tokens(1, 3))
    assert cache.lengths == tuple(cache.arrays.length.tolist()) == (96, 19)


def test_statistics_are_fixed_before_a_graph(replayed):
    """Until a token has left the window of each row, keys and queries are still observed."""
    cache = TorchCache(SPEC, 2)
    for seed in range(6):
        cache.extend(*tokens(1, seed))
    assert not replayed and not cache.arrays.statistics.ready.any()
    assert cache.arrays.statistics.query_count.ravel().tolist() == [6.0, 6.0]


def test_pools_are_shared_by_copies_of_one_model_only():
    pool = GraphPool()
    layers = [TorchCache(SPEC, 1, graph_pool=pool) for _ in range(2)]
    assert all(layer._pool is pool for layer in layers)
    for copies in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert copies[0]._pool is copies[1]._pool is not pool
    assert layers[0].fork()._pool is not pool


class Graph:
    """The calls that a CUDA graph gets, and a replay that computes anew."""

    def __init__(self):
        self.calls = []
        Graph.latest = self

    def capture_begin(self, pool, *, capture_error_mode):
        self.calls.append((pool, capture_error_mode))

    def capture_end(self):
        self.calls.append("end")

    def replay(self):
        self.out.copy_(2 * self.held[0])


@pytest.fixture
def fake_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))


@pytest.mark.usefixtures("fake_graphs")
def test_what_a_graph_reads_is_copied():
    def function(x):
        Graph.held, Graph.out = (x,), torch.empty_like(x)
        return Graph.out

    with torch.inference_mode():
        graph = TensorGraph(function, [torch.zeros(2, 1, 3)], GraphPool())
    assert graph._graph.calls == [((0, 1), "thread_local"), "end"]
    given = [torch.arange(6.0).reshape(3, 2, 1).transpose(0, 1), torch.ones(2, 1, 3, requires_grad=True)]
    results = []
    for x in (given[0].reshape(2, 1, 3), given[1]):
        graph.replay([x])
        results.append(graph.out.clone())
    torch.testing.assert_close(results, [2 * given[0].reshape(2, 1, 3), torch.full((2, 1, 3), 2.0)])
    assert not results[1].requires_grad


@pytest.mark.usefixtures("fake_graphs")
def test_a_capture_that_fails_ends():
    def function(x):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        TensorGraph(function, [torch.zeros(1)], GraphPool())
    assert Graph.latest.calls[-1] == "end"
