"""Tokens in full precision beside pages: kernels, interpreted, against the reference, over pools that hold NaN."""

import dataclasses
import functools
import itertools

import jax
import pytest

torch = pytest.importorskip("torch")

from interpreted import Interpreted, record_launches  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.launcher import program  # noqa: E402
from interop.launcher.launches import plan_launches  # noqa: E402
from interop.launcher.program import struct  # noqa: E402
from interop.torch import paged_on_gpu  # noqa: E402
from interop.torch.attend_on_gpu import AttendOptions  # noqa: E402
from interop.torch.paged import PagedPool  # noqa: E402
from interop.torch.paged_on_gpu import PagedAttend  # noqa: E402
from interop.torch.paged_rows import ExactRows, HotPool, PagedRows  # noqa: E402

PAGE = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and its sequences.

    Attributes:
        dim: Channels of a head.
        group: Query heads per KV head.
        dtype: Type of the model.
        tail: Most blocks of the latest tokens.
        first: Whether first blocks may be read in full precision.
        sequences: Of each: tokens, tokens of its first block in full precision, tokens from codes.
    """

    dim: int = 64
    group: int = 4
    dtype: torch.dtype = torch.float32
    tail: int = 3
    first: bool = True
    sequences: tuple[tuple[int, int, int], ...] = (
        (157, 32, 64), (150, 0, 128), (70, 0, 70), (33, 32, 0), (20, 0, 0), (0, 0, 0)
    )  # fmt: skip


BFLOAT16 = Case(dtype=torch.bfloat16)
CASES = {
    "float32": Case(),
    "bfloat16": BFLOAT16,
    "bfloat16, dim 128, group 1": dataclasses.replace(BFLOAT16, dim=128, group=1),
    "float16": Case(dtype=torch.float16),
    "no sinks": dataclasses.replace(BFLOAT16, first=False, tail=2, sequences=((101, 0, 64), (64, 0, 32), (1, 0, 0))),
    "no window": dataclasses.replace(BFLOAT16, tail=0, sequences=((101, 32, 69), (64, 0, 64), (33, 32, 1))),
}


class Layer:
    """A pool of random sequences; what nothing may read is NaN."""

    def __init__(self, case):
        self.case, self.random = case, torch.Generator().manual_seed(0)
        key, value = tq.QuantizerSpec(case.dim, 4, scale="unbiased"), tq.QuantizerSpec(case.dim, 4)
        entries, count = case.first + case.tail, len(case.sequences)
        blocks = 1 + torch.randperm(40, generator=self.random).int()
        slots = iter(torch.randperm(count * entries, generator=self.random).tolist())
        empty = torch.full((count * entries * PAGE + 1, 2, case.dim), torch.nan, dtype=case.dtype)
        self.hot = HotPool(empty, empty.clone(), case.first)
        memory = torch.full((41, 2, PAGE, key.bytes_per_vector + value.bytes_per_vector), 255, dtype=torch.uint8)
        quantizers = tq.make_quantizer(key), tq.make_quantizer(value, seed=1)
        statistics = self.normal(2, case.dim), 0.5 + torch.rand(2, case.dim, generator=self.random)
        self.pool = PagedPool(memory, *quantizers, case.dtype, statistics, self.hot)
        self.table, exact = torch.zeros(count, 6, dtype=torch.int32), torch.zeros(count, entries, dtype=torch.int32)
        for row, (length, begin, packed) in enumerate(case.sequences):
            k, v = (self.normal(length, 2, case.dim).to(case.dtype) for _ in range(2))
            self.table[row], blocks = blocks[:6], blocks[6:]
            position, stop = torch.arange(length), begin + packed
            code = (position >= begin) & (position < stop)
            place = self.table[row, (position - begin).clamp(0) // PAGE] * PAGE + (position - begin) % PAGE
            self.pool.write(k[code], v[code], place[code].int())
            exact[row] = torch.tensor(list(itertools.islice(slots, entries)))
            entry = ((position - stop).clamp(0) // PAGE + case.first).clamp(max=entries - 1)
            place = exact[row, entry].long() * PAGE + (position - stop) % PAGE
            place = torch.where(position < begin, exact[row, 0].long() * PAGE + position, place)
            place = torch.where(code, -1, place)
            for pool, tokens in ((self.hot.keys, k), (self.hot.values, v)):
                pool[place] = tokens
        lengths, begin, packed = (torch.tensor(x, dtype=torch.int32) for x in zip(*case.sequences, strict=True))
        self.rows = PagedRows(self.table, lengths, ExactRows(exact, begin, packed))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random)

    def query(self, count):
        case = self.case
        return self.normal(len(case.sequences), count, 2 * case.group, case.dim).to(case.dtype)

    def statistics(self):
        return self.pool._statistics(len(self.case.sequences))


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(program, "TorchProgram", Interpreted)
    monkeypatch.setattr(paged_on_gpu, "PagedAttend", functools.partial(PagedAttend, interpret=True))


def assert_alike(found, want, tolerance=2e-3):
    assert bool(want.any()) and bool(want.isfinite().all())
    assert float((found.float() - want.float()).norm() / want.float().norm()) < tolerance


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 3])
def test_few_queries(name, count, interpreted):
    layer = Layer(CASES[name])
    query, options = layer.query(count), AttendOptions(precise=True)
    want = layer.pool.attend(query, layer.rows, options)
    found, again = (layer.pool._kernels.attend(query, layer.rows, options, layer.statistics(), None) for _ in range(2))
    short = layer.rows.lengths < count  # queries before the first token
    assert_alike(found[~short], want[~short], 2e-3 if layer.case.dtype == torch.float32 else 6e-3)
    assert torch.equal(found, again)


def test_reference_is_attention():
    """Over tokens in full precision alone: plain attention of their latest query."""
    case = Case(group=1, sequences=((90, 32, 0), (20, 0, 0)))
    layer = Layer(case)
    query = layer.query(1)
    found = layer.pool.attend(query, layer.rows)
    for row, (length, begin, _) in enumerate(case.sequences):
        slots = layer.rows.exact.slots[row].tolist()
        places = [slots[0] * PAGE + i for i in range(begin)]
        places += [slots[1 + i // PAGE] * PAGE + i % PAGE for i in range(length - begin)]
        keys, values = layer.hot.keys[places], layer.hot.values[places]
        weights = (torch.einsum("hd,mhd->hm", query[row, 0], keys) * case.dim**-0.5).softmax(-1)
        torch.testing.assert_close(found[row, 0], torch.einsum("hm,mhd->hd", weights, values), rtol=0, atol=1e-5)


def test_no_launch_is_added():
    layer = Layer(BFLOAT16)
    spec = layer.pool.quantizers[0].spec, layer.pool.quantizers[1].spec
    table, lengths, *exact = layer.rows.tensors
    inputs = layer.pool._kernels._arrays, layer.query(1), table, lengths, *layer.statistics(), None, *exact
    plan = plan_launches(PagedAttend(*spec, AttendOptions(), first=True), *jax.tree.map(struct, inputs))
    assert [launch.kernel.name for launch in plan.launches] == ["prepare", "decode", "merge"]
    read = [{place.index for place in launch.arguments if place.kind == "input"} for launch in plan.launches]
    assert set().union(*read) == set(range(len(plan.inputs)))
    last_two = [len(jax.tree.leaves(inputs[0])) - i for i in (1, 2)]
    assert read[1].issuperset(last_two)  # decode has room for blocks of bfloat16


def test_kernels_are_compiled_ahead(monkeypatch):
    record_launches(monkeypatch)
    layer = Layer(BFLOAT16)
    monkeypatch.setattr(layer.pool, "device", torch.device("cuda"))
    options = AttendOptions()
    layer.pool.prepare_attend(4, layer.query(1)[:1], layer.rows, options)
    known = program._shared_program.cache_info().misses
    rows = layer.rows.map(lambda x: x[:4].clone())
    layer.pool._kernels.attend(layer.query(1)[:4], rows, options, layer.pool._statistics(4), None)
    assert program._shared_program.cache_info().misses == known
