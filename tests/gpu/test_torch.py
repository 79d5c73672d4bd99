"""The kernels as torch launches them on a GPU: against JAX over the same bytes, and CUDA graphs against eager steps."""

import contextlib

import pytest

torch = pytest.importorskip("torch")

from interop.launcher.cuda_graph import GraphPool  # noqa: E402
from interop.torch import jax_calls  # noqa: E402
from tests.gpu import torch_cases as cases  # noqa: E402
from tests.kernels.cases.whole_cache import Case  # noqa: E402

pytestmark = [
    pytest.mark.device,
    pytest.mark.usefixtures("jax_gpu", "torch_gpu"),
    pytest.mark.filterwarnings("default"),  # what torch and transformers warn of depends on their releases and the GPU
]
formats = pytest.mark.parametrize("name", cases.FORMATS)


def check(cache, query, *, precise=False, **options):
    """Compares attention with JAX's reference over the same memory, and two runs with each other."""
    found = cache.attend(query, precise=precise, **options)
    assert torch.equal(found, cache.attend(query, precise=precise, **options))
    count, group = query.shape[1], query.shape[2] // cases.KV_HEADS
    tolerance = Case(cache.spec, count=count, group=group, dtype="bfloat16").tolerance(precise=precise)
    if options.get("lengths") is not None:
        options["lengths"] = torch.tensor(options["lengths"], dtype=torch.int32, device=cases.DEVICE)
    want = jax_calls.attend(query, cache.as_jax(), implementation="reference", **options)
    assert cases.relative_error(found, want) <= tolerance


@formats
def test_one_query_per_row(name):
    cache, query = cases.filled_cache([900, 1, 517], 1024, name)
    for precise in (False, True):
        check(cache, query, precise=precise)
    launched_by_jax = jax_calls.attend(query, cache.as_jax(), implementation="triton")
    assert cases.relative_error(cache.attend(query), launched_by_jax) <= 1e-3


@formats
def test_chunks(name):
    """A short ragged chunk with every option of attention, then a long one."""
    cache, _ = cases.filled_cache([900, 1, 517], 1024, name)
    k, v, query = cases.make_tokens(3, 5, seed=2)
    cache.append(k, v, query=query, lengths=[5, 2, 0])
    sinks = torch.linspace(-1, 4, cases.Q_HEADS, device=cases.DEVICE)
    check(cache, query, lengths=[5, 2, 0], sliding_window=300, softcap=4.0, sink_logits=sinks)
    k, v, query = cases.make_tokens(3, 21, seed=3)
    cache.append(k, v, query=query)
    check(cache, query, precise=True)


LAYERS = 4


def test_a_captured_step_is_an_eager_one():
    """A step over several layers, captured once: appends and attention find the lengths on the GPU.

    Lengths differ between rows and pass the ends of pages; eager steps on copies leave the same bytes.
    """
    caches = [cases.filled_cache([900, 300], 1280)[0] for _ in range(LAYERS)]
    given = cases.make_tokens(2, 1, 3)
    cases.decode_step(caches, given)
    copies = [cache.fork() for cache in caches]
    cases.decode_step([cache.fork() for cache in copies], given)
    graph, out = cases.capture_step(caches, given)
    for seed in range(200):
        for held, new in zip(given, cases.make_tokens(2, 1, seed), strict=True):
            held.copy_(new)
        before = out.clone()
        for cache in caches:
            cache.advance()
        graph.replay()
        assert torch.equal(out, cases.decode_step(copies, given)), seed
        assert cases.relative_error(out, before) > 1e-2, seed
    assert cases.have_same_bytes(caches, copies)
    for cache, copy in zip(caches, copies, strict=True):
        assert cache.lengths == copy.lengths == tuple(cache.arrays.length.tolist())


def test_extending_is_appending_and_attending():
    """Layers share the memory of their graphs; on the way rows are reordered and the memory moves."""
    pool = GraphPool()
    caches = [cases.filled_cache([900, 300], 1280, pool=pool)[0] for _ in range(LAYERS)]
    copies = [cache.fork() for cache in caches]
    sinks = torch.linspace(-1, 4, cases.Q_HEADS, device=cases.DEVICE)
    for seed in range(120):
        k, v, query = cases.make_tokens(2, 1, seed)
        asked, options = query, {"sink_logits": sinks} if seed % 3 == 0 else {}
        for cache, copy in zip(caches, copies, strict=True):
            query = cache.extend(k, v, query, **options)
            copy.append(k, v, query=asked)
            asked = copy.attend(asked, **options)
        assert torch.equal(query, asked), seed
        for cache in (*caches, *copies):
            if seed == 40:
                cache.reorder([1, 0])
            if seed == 80:
                cache.reserve(1536)
    assert cases.have_same_bytes(caches, copies)


@pytest.fixture(scope="module")
def net():
    pytest.importorskip("transformers")
    return cases.smollm2_net()


@pytest.mark.parametrize("mode", cases.GENERATION)
def test_generating_from_graphs_gives_the_same_tokens(net, mode):
    """Graphs of whole steps and none, twice each; one of the two rows is padded."""
    from interop.hf import CACHE_ARGUMENT, TurboQuantCache
    from interop.hf.decoding_graphs import decoding_graphs

    found = []
    for graphs in (False, True, False, True):
        cache = TurboQuantCache(net.config)
        torch.manual_seed(1)
        options = cases.GENERATION[mode] | {CACHE_ARGUMENT: cache, "max_new_tokens": 96}
        with decoding_graphs(net, cache) if graphs else contextlib.nullcontext():
            found.append(net.generate(**cases.padded_prompts(), **options))
    assert all(torch.equal(found[0], tokens) for tokens in found)
