"""Which blocks have slots of a hot pool: any schedule of an engine against an obvious model; no vLLM is needed."""

import dataclasses
import functools
import random
import types

import pytest

torch = pytest.importorskip("torch")

import hypothesis.strategies as st  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from interpreted import Interpreted, record_launches  # noqa: E402
from window_model import Model  # noqa: E402

from interop.launcher import program  # noqa: E402
from interop.vllm import window, window_on_gpu  # noqa: E402
from interop.vllm.options import Options  # noqa: E402
from interop.vllm.window import HotTables, WindowSpec  # noqa: E402
from interop.vllm.window_on_gpu import KernelTables  # noqa: E402
from pallas_kernels.append.hot_blocks_triton import HotPlan  # noqa: E402
from pallas_kernels.numerics import power_of_two  # noqa: E402

BLOCKS, WIDTH, REQUESTS, CHUNK = 24, 10, 3, 22
"""Blocks of the cache, columns of block tables, most requests of a step, most tokens of a request in a step."""


def tables_of(kind, spec, *, tokens, **sizes):
    return kind(spec, filled=torch.full((tokens,), -1, dtype=torch.int32), **sizes)


@pytest.fixture
def kernels(monkeypatch):
    """The tables of a GPU, whose kernels JAX interprets."""
    monkeypatch.setattr(program, "TorchProgram", Interpreted)
    monkeypatch.setattr(window_on_gpu, "HotPlan", functools.partial(HotPlan, interpret=True))
    program._shared_program.cache_clear()
    yield KernelTables
    program._shared_program.cache_clear()


@dataclasses.dataclass(eq=False)
class Request:
    """A request: its text, its blocks, and how many of its tokens are computed."""

    text: list
    blocks: list = dataclasses.field(default_factory=list)
    computed: int = 0


class Engine:
    """Schedules requests at random, as vLLM might; tokens stand for the text up to them."""

    def __init__(self, spec, draw, kind=HotTables):
        self.spec, self.draw, self.model = spec, draw, Model(spec, REQUESTS)
        self.tables = tables_of(kind, spec, blocks=BLOCKS, requests=REQUESTS, tokens=REQUESTS * CHUNK + 4, width=WIDTH)
        self.pages, self.hot = {}, {}
        self.free, self.users, self.known = list(range(1, BLOCKS)), {}, {}
        self.running, self.waiting = [], []
        self.cold = 0

    def take(self, request, block):
        if block in self.free:
            self.free.remove(block)
        self.users[block] = self.users.get(block, 0) + 1
        request.blocks.append(block)

    def give_up(self, request):
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        request.blocks, request.computed = [], 0
        self.running.remove(request)

    def start(self):
        """A new request, a copy of another one's beginning, or one that was preempted; its prefix may be cached."""
        if self.waiting and self.draw.random() < 0.5:
            request = self.waiting.pop()
        else:
            texts = [r.text for r in self.running] + [[]]
            text = self.draw.choice(texts)
            text = text[: self.draw.randint(0, len(text))]
            more = self.draw.randint(1, WIDTH * self.spec.block // 2)
            most = WIDTH * self.spec.block - CHUNK - 1
            request = Request([*text, *(self.draw.random() for _ in range(more))][:most])
        self.running.append(request)
        size = self.spec.block
        for i in range((len(request.text) - 1) // size):
            block = self.known.get(tuple(request.text[: (i + 1) * size]))
            if block is None:
                break
            self.take(request, block)
            request.computed += size

    def tokens(self, request, count):
        """Makes room for tokens; None if there is too little."""
        needed = -(-(request.computed + count) // self.spec.block) - len(request.blocks)
        if needed > len(self.free) or len(request.blocks) + needed > WIDTH:
            return False
        for _ in range(needed):
            block = self.free[0]
            self.known = {text: b for text, b in self.known.items() if b != block}
            self.take(request, block)
        return True

    def step(self):
        draw, size = self.draw, self.spec.block
        while len(self.running) < REQUESTS and draw.random() < 0.7:
            self.start()
        for request in list(self.running):
            if draw.random() < 0.1:
                self.give_up(request)
                self.waiting += [request] if draw.random() < 0.5 else []
        scheduled = []
        for request in draw.sample(self.running, draw.randint(0, len(self.running))):
            left = len(request.text) - request.computed
            count = draw.randint(1, min(left, CHUNK)) if left > 0 else draw.randint(1, 4)
            if self.tokens(request, count):
                drafts = max(count - left, 0)
                request.text += [draw.random() for _ in range(drafts)]
                scheduled.append((request, count))
        self.run(scheduled)
        for request, count in scheduled:
            request.computed += count
            if request.computed == len(request.text) and count > 1 and draw.random() < 0.5:
                back = draw.randint(1, min(count - 1, 3))  # drafts that were refused
                request.computed -= back
                del request.text[-back:]
            for i in range(request.computed // size):
                self.known.setdefault(tuple(request.text[: (i + 1) * size]), request.blocks[i])
            if len(request.text) > WIDTH * size - CHUNK:
                self.give_up(request)

    def run(self, scheduled):
        """Writes and reads as a layer does; every token that is read is the right one."""
        size = self.spec.block
        table = torch.zeros(len(scheduled) + 1, WIDTH, dtype=torch.int32)  # and a request of padding
        lengths = torch.zeros(len(scheduled) + 1, dtype=torch.int32)
        slots, written, begun = [], [], set()
        for row, (request, count) in enumerate(scheduled):
            table[row, : len(request.blocks)] = torch.tensor(request.blocks, dtype=torch.int32)
            lengths[row] = request.computed + count
            for position in range(request.computed, request.computed + count):
                block, place = request.blocks[position // size], position % size
                slots.append(block * size + place)
                written.append(tuple(request.text[: position + 1]))
                begun |= {block} if not place else set()
        table[-1] = self.draw.randint(0, BLOCKS - 1)
        places = self.tables.update(table, lengths, torch.tensor([*slots, -1, -1])).tolist()
        assert self.tables._filled.tolist() == [*slots] + [-1] * (len(self.tables._filled) - len(slots))
        rows = [(request.blocks, request.computed + count) for request, count in scheduled]
        self.model.update(rows, begun)
        assert {b: s for b, s in enumerate(self.tables._hot.tolist()) if s >= 0} == self.model.slot
        assert places[len(slots) :] == [-1, -1]
        for slot, place, token in zip(slots, places, written, strict=False):
            self.pages[slot] = token
            hot = self.model.slot.get(slot // size)
            assert place == (-1 if hot is None else hot * size + slot % size)
            self.hot[place] = token
        earlier = [length - count for (_, length), (_, count) in zip(rows, scheduled, strict=True)]
        self.check(scheduled, table, lengths)
        self.check(scheduled, table, torch.tensor([*earlier, 0], dtype=torch.int32))

    def check(self, scheduled, table, lengths):
        size, spec = self.spec.block, self.spec
        found = self.tables.read(table, lengths)
        count, padded = len(lengths), power_of_two(len(lengths))
        assert (found.lengths is lengths) == (count == padded)
        assert found.lengths.tolist() == lengths.tolist() + [0] * (padded - count)
        assert {len(x) for x in found.tensors} == {padded}
        assert not found.exact.begin[count - 1 :].any() and not found.exact.packed[count - 1 :].any()
        for row, (request, _) in enumerate(scheduled):
            length = int(lengths[row])
            begin, packed = int(found.exact.begin[row]), int(found.exact.packed[row])
            assert (begin, begin + packed) == self.model.read(request.blocks, length)
            codes, *exact = found.table[row].tolist(), *found.exact.slots[row].tolist()
            latest = exact[spec.first :]
            for position in range(length):
                code, late = divmod(position - begin, size), divmod(position - begin - packed, size)
                if position < begin:
                    token = self.hot[exact[0] * size + position]
                elif position < begin + packed:
                    token = self.pages[codes[code[0]] * size + code[1]]
                    self.cold += position >= length - spec.window or position < spec.sinks
                else:
                    token = self.hot[latest[late[0]] * size + late[1]]
                assert token == tuple(request.text[: position + 1])
        assert int(self.tables.cold_reads) == self.cold


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    window=st.sampled_from((0, 1, 5, 8, 11)),
    sinks=st.sampled_from((0, 1, 4)),
)
def test_any_schedule(seed, window, sinks):
    """Allocation, prefix hits, preemption, drafts that are refused: no slot is leaked, and no stale token is read."""
    if not window and not sinks:
        return
    engine = Engine(WindowSpec(window, sinks, 4), random.Random(seed))
    for _ in range(40):
        engine.step()


@pytest.mark.parametrize(("window", "sinks"), [(5, 4), (0, 1), (11, 0)])
def test_any_schedule_on_kernels(window, sinks, kernels):
    """The kernels give the same tables."""
    engine = Engine(WindowSpec(window, sinks, 4), random.Random(window), kernels)
    for _ in range(40):
        engine.step()


def test_kernels_give_the_tables_of_torch(kernels):
    """More slots, tokens and entries than one program takes, and requests that share a block."""
    draw, spec = torch.Generator().manual_seed(0), WindowSpec(window=40, sinks=2, block=4)
    sizes = dict(blocks=900, requests=24, tokens=700, width=40)
    mine, want = (tables_of(kind, spec, **sizes) for kind in (kernels, HotTables))
    for count, most in ((24, 24), (5, 3), (24, 1), (1, 1), (17, 29), (24, 2)):
        table = torch.randperm(899, generator=draw)[: count * 37].view(count, 37).int() + 1
        table = torch.nn.functional.pad(table, (0, 3))
        lengths = torch.randint(0, 60, (count,), generator=draw, dtype=torch.int32)
        for step in range(3):
            lengths += most
            ends = [(row, at) for row, end in enumerate(lengths.tolist()) for at in range(end - most, end)]
            slots = torch.tensor([int(table[row, at // 4]) * 4 + at % 4 for row, at in ends] + [-1] * 3)
            if step:
                table[count // 2 :, 0] = table[0, 0]
            compare(mine, want, table, lengths, slots)


def compare(mine, want, table, lengths, slots):
    """A step of two tables, and what some of its requests read and all of them."""
    assert torch.equal(mine.update(table, lengths, slots), want.update(table, lengths, slots))
    for first in (len(lengths) // 3, 0):
        found, other = (tables.read(table[first:], lengths[first:]) for tables in (mine, want))
        for one, two in zip(found.tensors, other.tensors, strict=True):
            assert torch.equal(one[: len(lengths) - first], two[: len(lengths) - first])
            assert one.dim() == 2 or torch.equal(one, two)
    for name in ("_hot", "_owner", "_used"):
        assert torch.equal(getattr(mine, name)[:-1].long(), getattr(want, name)[:-1])
    assert torch.equal(mine._filled, want._filled) and torch.equal(mine._cold, want._cold)


def test_a_step_is_five_launches(monkeypatch):
    """In place, at the same addresses whatever the step holds; on GPUs, what it holds is told by one fill."""
    launched = record_launches(monkeypatch)
    tables = tables_of(KernelTables, WindowSpec(8, 2, 4), blocks=9, requests=3, tokens=16, width=3)
    table, lengths = torch.tensor([[3, 4, 5]] * 3, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    seen, slots = [], torch.arange(3)
    for count in (3, 2, 2):
        places = tables.update(table[:count], lengths[:count], slots[:count])
        rows = tables.read(table[:count], lengths[:count])
        assert tables._counts.view(torch.int32).tolist() == [count, count] and len(places) == count
        seen.append((launched[:], rows.table.data_ptr()))
        launched.clear()
    names = [f"{name}_hot_blocks" for name in ("mark", "choose", "give", "place", "read")]
    assert [name for name, *_ in seen[0][0]] == names
    assert seen[1] == seen[2]


def test_a_shared_block_keeps_its_slot():
    """Two requests begin the same block in a step: the slot that one got for nothing goes, not the block's."""
    tables = tables_of(HotTables, WindowSpec(0, 4, 4), blocks=9, requests=2, tokens=8, width=1)
    for blocks, begun in (([5, 5], [5]), ([5, 6], [6])):
        table = torch.tensor(blocks, dtype=torch.int32)[:, None]
        tables.update(table, torch.full((2,), 4, dtype=torch.int32), torch.tensor(begun) * 4)
        assert tables.read(table, torch.full((2,), 4, dtype=torch.int32)).exact.begin.tolist() == [4, 4]


@pytest.mark.parametrize("kind", [HotTables, "kernels"])
def test_decoding_reads_no_window_from_codes(kind, request, monkeypatch):
    """As many requests as there may be, from their first token on; also where the kernels forget all steps."""
    monkeypatch.setattr(window_on_gpu, "MOST_STEPS", 5)
    kind = request.getfixturevalue(kind) if isinstance(kind, str) else kind
    spec = WindowSpec(window=10, sinks=2, block=4)
    tables = tables_of(kind, spec, blocks=64, requests=3, tokens=64, width=20)
    table = (torch.arange(60, dtype=torch.int32) + 1).view(3, 20)
    for length in range(1, 70):
        lengths = torch.full((3,), length, dtype=torch.int32)
        last = length - 1
        tables.update(table, lengths, table[:, last // 4].long() * 4 + last % 4)
        found = tables.read(table, lengths)
        assert (found.exact.begin + found.exact.packed).tolist() == [max(length - 10, 0) // 4 * 4] * 3 + [0]
    assert int(tables.cold_reads) == 0


def test_news_of_cold_reads(monkeypatch):
    """Requests whose blocks were written before they had slots, as after a prefix hit."""
    monkeypatch.setattr(window, "NEWS", 2)
    tables = tables_of(HotTables, WindowSpec(8, 0, 4), blocks=9, requests=1, tokens=8, width=2)
    table, lengths = torch.tensor([[3, 4]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    said = []
    for _ in range(6):
        tables.update(table, lengths, torch.tensor([4 * 4 + 1]))
        tables.read(table, lengths)
        said.append(tables.news())
    assert said == [None, None, None, 12, None, 24] and int(tables.cold_reads) == 36


def test_specs():
    assert WindowSpec.of(Options(window=0, sinks=0), 32) is None
    assert WindowSpec.of(Options(), 64) == WindowSpec(128, 4, 64)
    assert [WindowSpec(w, s, 32).entries for w, s in ((128, 4), (128, 0), (0, 4), (1, 0), (33, 1))] == [6, 5, 1, 2, 4]
    with pytest.raises(ValueError, match="expected sinks of at most a block, 32 tokens, got sinks=33"):
        WindowSpec(128, 33, 32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"unit": None}, None),
        ({"connector": object()}, "a KV connector writes blocks that no step writes"),
        ({"halves": True}, "halves of a batch run side by side"),
        ({"unit": 16}, "prefixes of 16 tokens are shared, so that vLLM copies blocks that no step writes"),
    ],
)
def test_engines_without_a_window(changes, reason):
    """Slots are valid only if steps write every token of a block, which these engines do not promise."""
    given = {"connector": None, "halves": False, "unit": 64} | changes
    config = types.SimpleNamespace(
        kv_transfer_config=given["connector"],
        parallel_config=types.SimpleNamespace(use_ubatching=given["halves"]),
        cache_config=types.SimpleNamespace(block_size=64, hash_block_size=given["unit"]),
        additional_config=None,
    )
    assert window.why_off(config) == reason
    assert (window.window_of(config, 64) is None) == (reason is not None)
