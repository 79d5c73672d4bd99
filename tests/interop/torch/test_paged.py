"""Pages in memory of a serving engine: the codes and outputs of a torch cache, in any order of blocks and chunks."""

import dataclasses
import functools

import jax
import pytest

torch = pytest.importorskip("torch")

from interpreted import Interpreted, record_launches  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.launcher import program  # noqa: E402
from interop.launcher.launches import ArrayPlace, plan_launches  # noqa: E402
from interop.launcher.program import struct  # noqa: E402
from interop.torch import paged_dense, paged_on_gpu  # noqa: E402
from interop.torch.attend_on_gpu import AttendOptions  # noqa: E402
from interop.torch.blocks import TorchBlocks  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402
from interop.torch.paged import PagedPool  # noqa: E402
from interop.torch.paged_on_gpu import EncodePools, PagedAttend, PagedEncode  # noqa: E402
from interop.torch.paged_rows import HotPool, PagedRows  # noqa: E402
from interop.vllm.calls import RowBuffers, UniformCall, split_runs  # noqa: E402

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
    rows = PagedRows(TABLE, integers(*LENGTHS))
    torch.testing.assert_close(pool.attend(query, rows), cache.attend(query), rtol=0, atol=1e-6)
    options = dict(sliding_window=20, softcap=3.0, scale=0.3)
    out = torch.full_like(query, torch.nan)
    assert pool.attend(query, rows, AttendOptions(**options), sinks, out=out) is out
    torch.testing.assert_close(out, cache.attend(query, sink_logits=sinks, **options), rtol=0, atol=1e-6)
    shorter = PagedRows(TABLE, integers(50, 0))  # neither what comes behind nor padding is seen
    cache.crop(50)
    want = cache.attend(query[:, :1], lengths=[1, 0])
    torch.testing.assert_close(pool.attend(query[:, :1], shorter, sink_logits=sinks) != 0, want != 0)
    torch.testing.assert_close(pool.attend(query[:, :1], shorter), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_dense_tokens(centred, monkeypatch):
    """What the codes stand for, of all heads and of one; the launches of a GPU write the same, interpreted."""
    random = torch.Generator().manual_seed(1)
    statistics = (torch.randn(2, 64, generator=random), 0.5 + torch.rand(2, 64, generator=random)) if centred else None
    spec = tq.QuantizerSpec(64, 4)
    quantizers = tq.make_quantizer(spec), tq.make_quantizer(spec, seed=1)
    memory = torch.full((9, 2, PAGE, 68), 255, dtype=torch.uint8)
    pool, tokens = PagedPool(memory, *quantizers, torch.float32, statistics), []
    for table, length in zip(TABLE, LENGTHS, strict=True):
        k, v = torch.randn(2, length, 2, 64, generator=random)
        position = torch.arange(length)
        pool.write(k, v, table[position // PAGE].long() * PAGE + position % PAGE)
        tokens.append((k, v))
    monkeypatch.setattr(program, "TorchProgram", Interpreted)
    real = paged_dense.dequantize_pages
    monkeypatch.setattr(
        paged_dense, "dequantize_pages", lambda x, *, interpret, **options: real(x, interpret=True, **options)
    )
    starts, rows = (40, 2), PagedRows(TABLE, integers(*LENGTHS))
    for heads in ([0, 1], [1]):
        dense = [torch.full((150, len(heads), 64), torch.nan) for _ in range(4)]
        pool.dequantize(rows, integers(*starts), integers(*heads), (dense[0], dense[1]))
        given = None if statistics is None else pool._statistics(2)
        pool._kernels.dequantize(rows, integers(*starts), integers(*heads), given, (dense[2], dense[3]))
        for start, (k, v) in zip(starts, tokens, strict=True):
            part = slice(start, start + len(k))
            for want, known, found in ((k, dense[0], dense[2]), (v, dense[1], dense[3])):
                torch.testing.assert_close(found[part], known[part], rtol=0, atol=5e-3)
                assert float((known[part] - want[:, heads]).norm() / want[:, heads].norm()) < (0.2 if centred else 0.11)


def test_nothing_to_write():
    pool = make_pool(*FORMATS["mse"])
    pool.write(torch.ones(2, 2, D), torch.ones(2, 2, D), torch.tensor([-1, -1]))
    assert all(bool((leaf.view(torch.uint8) == 255).all()) for leaf in jax.tree.leaves(pool.pages))


def test_pages_fill_the_memory():
    """Every byte belongs to one array, and arrays are views."""
    memory = torch.zeros(5, 3, PAGE, MSE.bytes_per_vector * 2, dtype=torch.uint8)
    pages = TorchBlocks(memory, MSE, MSE).pages
    for leaf in jax.tree.leaves(pages):
        leaf.view(torch.uint8).add_(1)
    assert bool((memory == 1).all())
    wide = torch.zeros(5, 3, PAGE, MSE.bytes_per_vector // 2, dtype=torch.float32)
    assert TorchBlocks(wide, MSE, MSE).pages.keys.scale.shape == (5, 3, PAGE)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (
            torch.zeros(5, 2, PAGE, 35, dtype=torch.uint8),
            "expected blocks without gaps of 36 bytes per head and token, got 35",
        ),
        (torch.zeros(5, PAGE, 2, 36, dtype=torch.uint8).transpose(1, 2), "got 36 with strides"),
        (torch.zeros(5, 1, 6, 36, dtype=torch.uint8), "a multiple of 16 bytes apart .* got 216 bytes apart"),
    ],
)
def test_memory_that_does_not_fit_is_refused(memory, message):
    with pytest.raises(ValueError, match=message):
        TorchBlocks(memory, MSE, MSE)


@pytest.mark.parametrize("centred", [False, True])
def test_launches_on_a_gpu(centred):
    """Prepare, decode, merge over vLLM's own block table, and one encode in place; that they compute the same is
    measured on a GPU."""
    spec = tq.QuantizerSpec(64, 4)
    quantizers = tq.make_quantizer(spec), tq.make_quantizer(spec, seed=1)
    pool = PagedPool(torch.zeros(9, 2, PAGE, 68, dtype=torch.uint8), *quantizers, torch.bfloat16)
    query, table = torch.zeros(4, 2, 8, 64, dtype=torch.bfloat16), torch.zeros(4, 6, dtype=torch.int32)
    given = [torch.ones(4, 2, 64) if centred else None] * 2
    inputs = (pool._kernels._arrays, query, table, integers(0, 0, 0, 0), *given, torch.zeros(8))
    plan = plan_launches(PagedAttend(spec, spec, AttendOptions()), *jax.tree.map(struct, inputs))
    assert [launch.kernel.name for launch in plan.launches] == ["prepare", "decode", "merge"]
    assert plan.outputs == (ArrayPlace("output", 0),) and plan.made == (((4, 2, 8, 64), "bfloat16"),)
    read = [{place.index for place in launch.arguments if place.kind == "input"} for launch in plan.launches]
    assert set().union(*read) == set(range(len(plan.inputs)))
    own_table = 1 + len(jax.tree.leaves(pool._kernels._arrays))
    assert own_table in read[1] and own_table not in read[0]

    tokens, slots = torch.zeros(16, 1, 2, 64, dtype=torch.bfloat16), torch.zeros(16, 1, dtype=torch.int32)
    given = [torch.ones(1, 2, 64)] * 2 + [integers(*[0] * 16)] if centred else [None] * 3
    encode = PagedEncode(*quantizers)
    pools = EncodePools(pool._blocks.rows(), None, None)
    plan = plan_launches(encode, *jax.tree.map(struct, (pools, tokens, tokens, slots, *given, None)))
    assert [launch.kernel.name for launch in plan.launches] == ["encode"] and plan.made == ()
    assert plan.outputs == tuple(ArrayPlace("input", i) for i in range(len(jax.tree.leaves(pool.pages))))
    hot = torch.zeros(65, 2, 64, dtype=torch.bfloat16)
    pools, places = dataclasses.replace(pools, exact_keys=hot, exact_values=hot), torch.zeros(16, 1, 2).int()
    plan = plan_launches(encode, *jax.tree.map(struct, (pools, tokens, tokens, slots, *given, places)))
    assert [launch.kernel.name for launch in plan.launches] == ["encode"] and plan.made == ()
    assert plan.outputs == tuple(ArrayPlace("input", i) for i in range(len(jax.tree.leaves(pool.pages)) + 2))
    assert encode == PagedEncode(*quantizers) and hash(encode) == hash(PagedEncode(*quantizers))
    assert encode != PagedEncode(quantizers[1], quantizers[0])


def test_outputs_go_where_they_are_told_to(monkeypatch):
    """Lowered for a GPU, and launched by torch without one; many queries take their own kernel."""
    launched = record_launches(monkeypatch)
    spec = tq.QuantizerSpec(64, 4)
    quantizers = tq.make_quantizer(spec), tq.make_quantizer(spec, seed=1)
    kernels = PagedPool(torch.zeros(3, 2, 64, 68, dtype=torch.uint8), *quantizers, torch.bfloat16)._kernels
    query, zero = torch.zeros(1, 16, 4, 64, dtype=torch.bfloat16), integers(0)
    kernels.attend(query, PagedRows(TABLE[:1], zero), AttendOptions(), None, None)
    assert [call[0] for call in launched] == ["prepare", "prefill", "merge"]
    launched.clear()
    out = torch.zeros_like(query[:, :1])
    rows = PagedRows(TABLE[:1], zero)
    assert kernels.attend(query[:, :1], rows, AttendOptions(), None, None, out) is out
    assert [call[0] for call in launched] == ["prepare", "decode", "merge"] and out.data_ptr() in launched[2]
    with pytest.raises(ValueError, match=r"expected bfloat16\[1, 1, 4, 64\] on cpu, got bfloat16\[1, 2, 4, 64\]"):
        kernels.attend(query[:, :1], rows, AttendOptions(), None, None, query[:, :2])


@pytest.mark.parametrize("centred", [False, True])
def test_kernels_are_compiled_ahead(centred, monkeypatch):
    """Later calls of the sizes that were prepared lower and compile nothing."""
    launched = record_launches(monkeypatch)
    spec = tq.QuantizerSpec(64, 4)
    quantizers = tq.make_quantizer(spec, seed=7), tq.make_quantizer(spec, seed=8)
    statistics = (torch.zeros(2, 64), torch.ones(2, 64)) if centred else None
    memory = torch.zeros(3, 2, 32, 68, dtype=torch.uint8)
    pool = PagedPool(memory, *quantizers, torch.bfloat16, statistics)
    monkeypatch.setattr(paged_on_gpu, "WRITES", (16, 32))
    monkeypatch.setattr(pool, "device", torch.device("cuda"))
    query, rows, sinks = torch.zeros(3, 1, 4, 64).bfloat16(), PagedRows(TABLE[:1], integers(0)), torch.zeros(4)
    pool.prepare_writes(*torch.zeros(2, 1, 2, 64).bfloat16())
    pool.prepare_attend(3, query[:1], rows, AttendOptions(), sinks)
    known = program._shared_program.cache_info().misses
    assert not launched
    for count in (1, 2, 3):
        if count < 3:
            again = PagedRows(TABLE[:count], integers(*[0] * count))
            pool._kernels.attend(
                query[:count], again, AttendOptions(),
                None if statistics is None else tuple(x.expand(count, 2, 64).contiguous() for x in statistics), sinks,
            )  # fmt: skip
        tokens = torch.zeros(10 * count, 2, 64).bfloat16()
        pool._kernels.write(tokens, tokens, torch.arange(10 * count), pool.statistics)
    assert program._shared_program.cache_info().misses == known
    assert [call[0] for call in launched].count("encode") == 3 and len(launched) == 9


@pytest.mark.parametrize("centred", [False, True])
def test_kernels_write_what_the_cpu_does(centred, monkeypatch):
    """Interpreted: tokens between others in memory, padding to a size of the kernels, of which nothing is read."""
    monkeypatch.setattr(program, "TorchProgram", Interpreted)
    real = paged_on_gpu.encode.encode_and_copy
    monkeypatch.setattr(
        paged_on_gpu.encode,
        "encode_and_copy",
        lambda tokens, pages, exact, interpret: real(tokens, pages, exact, interpret=True),
    )
    monkeypatch.setattr(paged_on_gpu, "WRITES", (16, 32))
    spec, random = tq.QuantizerSpec(64, 4), torch.Generator().manual_seed(0)
    quantizers = tq.make_quantizer(spec), tq.make_quantizer(spec, seed=1)
    statistics = (torch.randn(2, 64, generator=random), 0.5 + torch.rand(2, 64, generator=random)) if centred else None
    hot = [HotPool(*torch.zeros(2, 65, 2, 64).unbind(), first=True) for _ in range(2)]
    want, found = (
        PagedPool(torch.full((4, 2, 32, 68), 255, dtype=torch.uint8), *quantizers, torch.float32, statistics, pool)
        for pool in hot
    )
    projected = torch.randn(43, 8, 64, generator=random)
    tokens = projected[:, 4:6], projected[:, 6:]
    slots = torch.randperm(128, generator=random)[:43]
    places = torch.where(torch.arange(43) % 3 == 0, torch.arange(43), -1)
    slots[7] = places[7] = -1
    want.write(*tokens, slots, places)
    padded = torch.full((48,), -1, dtype=torch.int32)
    padded[:43] = slots
    for given in (slots, padded):
        found._kernels.write(*tokens, given, found.statistics, places)
        for mine, theirs in ((hot[1].keys, hot[0].keys), (hot[1].values, hot[0].values)):
            assert torch.equal(mine[:43], theirs[:43]) and bool(mine[0].any())
            mine.zero_()
        for mine, theirs in zip(jax.tree.leaves(found.pages), jax.tree.leaves(want.pages), strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
            mine.view(torch.uint8).fill_(255)


def test_kernels_compute_what_the_cpu_does(monkeypatch):
    """Interpreted: a decode, centred, over pages that hold NaN."""
    monkeypatch.setattr(program, "TorchProgram", Interpreted)
    monkeypatch.setattr(paged_on_gpu, "PagedAttend", functools.partial(PagedAttend, interpret=True))
    key, value = tq.QuantizerSpec(64, 4, scale="unbiased"), tq.QuantizerSpec(64, 4)
    quantizers, random = (tq.make_quantizer(key), tq.make_quantizer(value, seed=1)), torch.Generator().manual_seed(0)
    statistics = torch.randn(2, 64, generator=random), 0.5 + torch.rand(2, 64, generator=random)
    memory = torch.full((7, 2, 64, 68), 255, dtype=torch.uint8)
    pool = PagedPool(memory, *quantizers, torch.float32, statistics)
    table, lengths = torch.tensor([[2, 5, 0], [3, 1, 6]], dtype=torch.int32), [70, 150]
    for row, length in zip(table, lengths, strict=True):
        k, v = torch.randn(2, length, 2, 64, generator=random)
        pool.write(k, v, row[torch.arange(length) // 64] * 64 + torch.arange(length) % 64)
    query, sinks = torch.randn(2, 4, 64, generator=random), torch.randn(4, generator=random)
    options = AttendOptions(sliding_window=90, softcap=5.0, precise=True)

    class OnKernels:
        def attend(self, query, rows, options, sinks, *, out):
            return pool._kernels.attend(query, rows, options, pool._statistics(len(query)), sinks, out)

    [run], _ = split_runs([0, 1, 2], 1)
    rows = RowBuffers(4).rows(run, PagedRows(table, integers(*lengths)))
    want, found = (torch.zeros_like(query) for _ in range(2))
    for layer, output in ((pool, want), (OnKernels(), found)):
        UniformCall(run, rows).attend(layer, query, output, options, sinks)
    assert bool(want.any()) and float((found - want).norm() / want.norm()) < 1e-3
    assert float((found - want).abs().max()) < 5e-3
