"""Pages in memory of a serving engine: the codes and outputs of a torch cache, in any order of blocks and chunks."""

import functools

import jax
import pytest

torch = pytest.importorskip("torch")

from interpreted import Interpreted, record_launches  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.launcher import program  # noqa: E402
from interop.launcher.launches import ArrayPlace, plan_launches  # noqa: E402
from interop.launcher.program import struct  # noqa: E402
from interop.torch import paged_on_gpu  # noqa: E402
from interop.torch.attend_on_gpu import AttendOptions  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402
from interop.torch.paged import PagedPool, PagedRows, view_pages  # noqa: E402
from interop.torch.paged_on_gpu import PagedAttend, PagedEncode  # noqa: E402
from interop.vllm.calls import SIZES, plan_calls  # noqa: E402

D, PAGE = 32, 32
MSE, PROD = tq.QuantizerSpec(D, 4, scale="unbiased", search=True), tq.QuantizerSpec(D, 3, kind="prod")
FORMATS = {"mse": (MSE, tq.QuantizerSpec(D, 3)), "prod, groups": (PROD, tq.QuantizerSpec(D, 2, kind="group"))}
TABLE, LENGTHS = torch.tensor([[3, 1, 8, 5], [2, 7, 0, 0]], dtype=torch.int32), (100, 37)


def make_pool(key, value, statistics=None):
    """A pool in memory that holds garbage, NaN scales included."""
    memory = torch.full((9, 2, PAGE, key.bytes_per_vector + value.bytes_per_vector), 255, dtype=torch.uint8)
    quantizers = tq.make_quantizer(key, seed=0), tq.make_quantizer(value, seed=1)
    return PagedPool(memory, *quantizers, torch.float32, statistics)


def make_cache(key, value, statistics=None):
    own = statistics is not None
    spec = tq.CacheSpec(
        2, D, 128, key, value, window=0, sink_tokens=0, center_keys=own, smooth_keys=own, page_size=PAGE,
        dtype="float32",
    )  # fmt: skip
    given = None if statistics is None else tuple(jax.numpy.asarray(x.numpy()) for x in statistics)
    return TorchCache(spec, 2, statistics=given)


def integers(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(("form", "centred"), [("mse", False), ("prod, groups", True)])
def test_equal_to_a_cache(form, centred):
    """Two sequences, written in two chunks to scattered blocks; the second one's padding is skipped."""
    random = torch.Generator().manual_seed(0)
    statistics = None
    if centred:
        statistics = torch.randn(2, D, generator=random), 0.5 + torch.rand(2, D, generator=random)
    pool, cache = (make(*FORMATS[form], statistics) for make in (make_pool, make_cache))
    k, v = torch.randn(2, 2, 100, 2, D, generator=random)
    cache.append(k, v, lengths=LENGTHS)
    position = torch.arange(100)
    slots = TABLE[:, position // PAGE].long() * PAGE + position % PAGE
    slots[1, LENGTHS[1] :] = -1
    for part in (slice(0, 41), slice(41, 100)):
        for row in range(2):
            pool.write(k[row, part], v[row, part], slots[row, part])
    query, sinks = torch.randn(2, 5, 8, D, generator=random), torch.randn(8, generator=random)
    rows, counts = PagedRows(TABLE, integers(*LENGTHS), integers(5, 3)), [5, 3]
    torch.testing.assert_close(pool.attend(query, rows), cache.attend(query, lengths=counts), rtol=0, atol=1e-6)
    options = dict(sliding_window=20, softcap=3.0, scale=0.3)
    found = pool.attend(query, rows, AttendOptions(**options), sinks)
    torch.testing.assert_close(
        found, cache.attend(query, lengths=counts, sink_logits=sinks, **options), rtol=0, atol=1e-6
    )
    earlier = PagedRows(TABLE, integers(50, 37), integers(1, 0))  # what comes behind is not seen
    cache.crop(50)
    torch.testing.assert_close(
        pool.attend(query[:, :1], earlier), cache.attend(query[:, :1], lengths=[1, 0]), rtol=0, atol=1e-6
    )


def test_nothing_to_write():
    pool = make_pool(*FORMATS["mse"])
    pool.write(torch.ones(2, 2, D), torch.ones(2, 2, D), torch.tensor([-1, -1]))
    assert all(bool((leaf.view(torch.uint8) == 255).all()) for leaf in jax.tree.leaves(pool.pages))


def test_pools_fill_the_memory():
    """Every byte belongs to one pool, and pools are views."""
    memory = torch.zeros(5, 3, PAGE, MSE.bytes_per_vector * 2, dtype=torch.uint8)
    pages = view_pages(memory, MSE, MSE)
    for leaf in jax.tree.leaves(pages):
        leaf.view(torch.uint8).add_(1)
    assert bool((memory == 1).all())
    wide = torch.zeros(5, 3, PAGE, MSE.bytes_per_vector // 2, dtype=torch.float32)
    assert view_pages(wide, MSE, MSE).keys.scale.shape == (5, 3, PAGE)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (
            torch.zeros(5, 2, PAGE, 35, dtype=torch.uint8),
            "expected dense memory of 36 bytes per head and token, got 35",
        ),
        (torch.zeros(5, PAGE, 2, 36, dtype=torch.uint8).transpose(1, 2), "got 36 with strides"),
        (torch.zeros(5, 1, 6, 36, dtype=torch.uint8), "multiples of 64 bytes, got .* a page_size that 64 divides"),
    ],
)
def test_memory_that_does_not_fit_is_refused(memory, message):
    with pytest.raises(ValueError, match=message):
        view_pages(memory, MSE, MSE)


@pytest.mark.parametrize("centred", [False, True])
def test_launches_on_a_gpu(centred):
    """Prepare, decode, merge over vLLM's own block table, and one encode in place; that they compute the same is
    measured on a GPU."""
    spec = tq.QuantizerSpec(64, 4)
    quantizers = tq.make_quantizer(spec), tq.make_quantizer(spec, seed=1)
    pool = PagedPool(torch.zeros(9, 2, PAGE, 68, dtype=torch.uint8), *quantizers, torch.bfloat16)
    query, table = torch.zeros(4, 2, 8, 64, dtype=torch.bfloat16), torch.zeros(4, 6, dtype=torch.int32)
    given = [torch.ones(4, 2, 64) if centred else None] * 2
    inputs = (pool._kernels._arrays, query, table, integers(0, 0, 0, 0), integers(0, 0, 0, 0), *given, torch.zeros(8))
    plan = plan_launches(PagedAttend(spec, spec, AttendOptions()), *jax.tree.map(struct, inputs))
    assert [launch.kernel.name for launch in plan.launches] == ["prepare", "decode", "merge"]
    assert plan.outputs == (ArrayPlace("output", 0),) and plan.made == (((4, 2, 8, 64), "bfloat16"),)
    read = [{place.index for place in launch.arguments if place.kind == "input"} for launch in plan.launches]
    assert set().union(*read) == set(range(len(plan.inputs)))
    own_table = 1 + len(jax.tree.leaves(pool._kernels._arrays))
    assert own_table in read[1] and own_table not in read[0]

    tokens, slots = torch.zeros(8, 1, 2, 64, dtype=torch.bfloat16), torch.zeros(8, 1, dtype=torch.int32)
    given = [torch.ones(8, 2, 64) if centred else None] * 2
    encode = PagedEncode(*quantizers)
    plan = plan_launches(encode, *jax.tree.map(struct, (pool.pages, tokens, tokens, slots, *given)))
    assert [launch.kernel.name for launch in plan.launches] == ["encode"] and plan.made == ()
    assert plan.outputs == tuple(ArrayPlace("input", i) for i in range(len(jax.tree.leaves(pool.pages))))
    assert encode == PagedEncode(*quantizers) and hash(encode) == hash(PagedEncode(*quantizers))
    assert encode != PagedEncode(quantizers[1], quantizers[0])


def test_long_chunks_take_their_kernel(monkeypatch):
    """Lowered for a GPU, and launched by torch without one."""
    launched = record_launches(monkeypatch)
    spec = tq.QuantizerSpec(64, 4)
    quantizers = tq.make_quantizer(spec), tq.make_quantizer(spec, seed=1)
    pool = PagedPool(torch.zeros(3, 2, 64, 68, dtype=torch.uint8), *quantizers, torch.bfloat16)
    query, lengths = torch.zeros(1, 16, 4, 64, dtype=torch.bfloat16), integers(0)
    out = pool._kernels.attend(query, TABLE[:1], lengths, lengths, AttendOptions(), None, None)
    assert [call[0] for call in launched] == ["prepare", "prefill", "merge"]
    assert out.shape == query.shape and out.dtype == query.dtype


def test_kernels_compute_what_the_cpu_does(monkeypatch):
    """Interpreted: a decode and two ragged chunks in one step, centred, with sinks, over pages that hold NaN."""
    monkeypatch.setattr(program, "TorchProgram", Interpreted)
    monkeypatch.setattr(paged_on_gpu, "PagedAttend", functools.partial(PagedAttend, interpret=True))
    key, value = tq.QuantizerSpec(64, 4, scale="unbiased"), tq.QuantizerSpec(64, 4)
    quantizers, random = (tq.make_quantizer(key), tq.make_quantizer(value, seed=1)), torch.Generator().manual_seed(0)
    statistics = torch.randn(2, 64, generator=random), 0.5 + torch.rand(2, 64, generator=random)
    memory = torch.full((7, 2, 64, 68), 255, dtype=torch.uint8)
    pool = PagedPool(memory, *quantizers, torch.float32, statistics)
    table, lengths, counts = torch.tensor([[3, 1, 6], [2, 5, 0], [4, 0, 0]]), [150, 70, 40], [24, 1, 30]
    for row, length in zip(table, lengths, strict=True):
        k, v = torch.randn(2, length, 2, 64, generator=random)
        pool.write(k, v, row[torch.arange(length) // 64] * 64 + torch.arange(length) % 64)
    query, sinks = torch.randn(sum(counts), 4, 64, generator=random), torch.randn(4, generator=random)
    options = AttendOptions(sliding_window=90, softcap=5.0, precise=True)
    sizes = SIZES["cuda"]
    calls = plan_calls([0, 24, 25, 55], integers(*lengths), table.int(), sizes)
    assert [tuple(call.rows.counts.tolist()) for call in calls] == [(1,), (24, 30)]
    want, found = torch.zeros_like(query), torch.zeros_like(query)
    for call in calls:
        asked, rows = call.take(query), call.rows
        call.put(pool.attend(asked, rows, options, sinks), want)
        given = pool._statistics(len(asked))
        arguments = rows.table, rows.lengths, rows.counts, options, given, sinks
        call.put(pool._kernels.attend(asked, *arguments), found)
    assert float((found - want).norm() / want.norm()) < 1e-3
    assert float((found - want).abs().amax((1, 2)).max()) < 5e-3
