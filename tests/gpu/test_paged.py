"""Pages of a serving engine on a GPU: the kernels that torch launches against the reference on the CPU."""

import contextlib
import dataclasses
from itertools import accumulate

import jax
import pytest

torch = pytest.importorskip("torch")

import tq_jax as tq  # noqa: E402
from interop.launcher.cuda_graph import GraphPool  # noqa: E402
from interop.torch.attend_on_gpu import AttendOptions  # noqa: E402
from interop.torch.paged import PagedPool  # noqa: E402
from interop.torch.paged_rows import HotPool, PagedRows  # noqa: E402
from interop.vllm.calls import RowBuffers, UniformCall, split_runs  # noqa: E402
from interop.vllm.window import HotTables, WindowSpec  # noqa: E402
from interop.vllm.window_on_gpu import KernelTables  # noqa: E402

pytestmark = [
    pytest.mark.device,
    pytest.mark.usefixtures("torch_gpu"),
    pytest.mark.filterwarnings("default"),  # what torch warns of depends on its release and the GPU
]

LENGTHS, COUNTS = [33, 1, 5, 257, 700], [1, 1, 3, 8, 300]
BLOCKS = 64
DEVICE = "cuda"


def mse(dim, bits, **options):
    return tq.QuantizerSpec(dim, bits, search=True, **options)


def unbiased(dim, bits):
    return mse(dim, bits, scale="unbiased")


@dataclasses.dataclass(frozen=True)
class PagedCase:
    """One layer of a serving engine.

    Attributes:
        key: Quantizer of keys.
        value: Quantizer of values.
        kv_heads: KV heads.
        group: Query heads per KV head.
        page_size: Tokens per page.
        dtype: Type of the model.
        extras: Whether keys are centred and weighted, and heads have sink logits.
        options: Of the attention.
        tolerance: Largest relative error.
    """

    key: tq.QuantizerSpec
    value: tq.QuantizerSpec
    kv_heads: int = 2
    group: int = 4
    page_size: int = 32
    dtype: torch.dtype = torch.bfloat16
    extras: bool = False
    options: AttendOptions = AttendOptions(precise=True)  # noqa: RUF009
    tolerance: float = 2e-3


PROD, GROUP = tq.QuantizerSpec(128, 3, kind="prod"), tq.QuantizerSpec(128, 2, kind="group")
LIMITED = AttendOptions(sliding_window=100, softcap=5.0, scale=0.1, precise=True)
CASES = {
    "K4V4": PagedCase(unbiased(128, 4), mse(128, 4)),
    "K4V4, one byte": PagedCase(unbiased(128, 4), mse(128, 4), options=AttendOptions(), tolerance=2e-2),
    "K4V4, statistics, sinks": PagedCase(
        unbiased(64, 4), mse(64, 4), kv_heads=3, group=3, page_size=64, extras=True
    ),
    "K3V3, window, cap": PagedCase(
        unbiased(128, 3), mse(128, 3), group=8, page_size=128, dtype=torch.float16, options=LIMITED
    ),
    "K8V4, float32": PagedCase(unbiased(96, 8), mse(96, 4), kv_heads=1, dtype=torch.float32),
    "prod, groups": PagedCase(PROD, GROUP, group=2, page_size=64),
}  # fmt: skip


def jax_on(device: str) -> contextlib.AbstractContextManager:
    """For a pool on the CPU, makes JAX compute there even where it has a GPU."""
    return jax.default_device(jax.devices("cpu")[0]) if device == "cpu" else contextlib.nullcontext()


class Step:
    """Two pools of the same garbage, one per device, and the tokens of one step."""

    def __init__(self, case: PagedCase) -> None:
        self.case, self.random = case, torch.Generator().manual_seed(0)
        heads, dim = case.kv_heads, case.key.dim
        self.table = torch.zeros(len(LENGTHS), -(-max(LENGTHS) // case.page_size) + 2, dtype=torch.int32)
        blocks = torch.randperm(BLOCKS - 1, generator=self.random) + 1
        for row, length in enumerate(LENGTHS):
            used = -(-length // case.page_size)
            self.table[row, :used], blocks = blocks[:used], blocks[used:]
        statistics = self.sinks = None
        if case.extras:
            statistics = self.normal(heads, dim) / 2, torch.rand(heads, dim, generator=self.random) + 0.5
            self.sinks = self.normal(heads * case.group)
        content = -(-(case.key.bytes_per_vector + case.value.bytes_per_vector) // 2)
        memory = torch.full((BLOCKS, heads, case.page_size, content), -1, dtype=torch.int16)  # scales are NaN
        quantizers = tq.make_quantizer(case.key), tq.make_quantizer(case.value, seed=1)
        self.pools = {
            device: PagedPool(memory.to(device, copy=True), *quantizers, case.dtype, statistics)
            for device in ("cpu", DEVICE)
        }

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def write(self) -> None:
        """Writes all tokens of all sequences, in two parts."""
        size, shape = self.case.page_size, (sum(LENGTHS), self.case.kv_heads, self.case.key.dim)
        k, v = (self.normal(*shape).to(self.case.dtype) for _ in range(2))
        position = torch.cat([torch.arange(length) for length in LENGTHS])
        request = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
        slots = self.table[request, position // size].long() * size + position % size
        for part in (slice(0, 511), slice(511, None)):
            for device, pool in self.pools.items():
                with jax_on(device):
                    pool.write(k[part].to(device), v[part].to(device), slots[part].to(device))

    def attend(self, device: str, query: torch.Tensor) -> torch.Tensor:
        """Outputs of the last tokens of the sequences that decode; of others, nothing."""
        output, query = torch.zeros_like(query, device=device), query.to(device)
        sinks = None if self.sinks is None else self.sinks.to(device)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        runs, _ = split_runs([0, *accumulate(COUNTS)], 8)
        buffers, rows = RowBuffers(len(LENGTHS)), PagedRows(self.table.to(device), lengths)
        with jax_on(device):
            for run in runs:
                UniformCall(run, buffers.rows(run, rows)).attend(
                    self.pools[device], query, output, self.case.options, sinks
                )
        return output.cpu()

    def dense(self, device: str, heads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all sequences, in reverse order and with a place between them."""
        lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        ends = (lengths + 1).flip(0).cumsum(0, dtype=torch.int32).flip(0)
        shape = int(ends[0]), len(heads), self.case.key.dim
        out = torch.zeros(2, *shape, dtype=self.case.dtype, device=device).unbind()
        rows = PagedRows(self.table.to(device), lengths)
        with jax_on(device):
            chosen = torch.tensor(heads, dtype=torch.int32, device=device)
            self.pools[device].dequantize(rows, ends - lengths - 1, chosen, (out[0], out[1]))
        return out[0].cpu(), out[1].cpu()


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_cpu(name):
    """Nearly all bytes are equal after writing; over equal bytes attention is."""
    case = CASES[name]
    step = Step(case)
    step.write()
    leaves = [jax.tree.leaves(step.pools[device].pages) for device in ("cpu", DEVICE)]
    for mine, theirs in zip(*leaves, strict=True):
        if mine.dtype == torch.uint8:
            assert float((mine == theirs.cpu()).float().mean()) > 0.98
        mine.copy_(theirs)
    query = step.normal(sum(COUNTS), case.kv_heads * case.group, case.key.dim).to(case.dtype)
    want, found, again = (step.attend(device, query) for device in ("cpu", DEVICE, DEVICE))
    assert torch.equal(found, again)
    assert float((found.float() - want.float()).norm() / want.float().norm()) < case.tolerance
    for heads in (list(range(case.kv_heads)), [case.kv_heads - 1]):
        want, found, again = (step.dense(device, heads) for device in ("cpu", DEVICE, DEVICE))
        rounding = 5e-4 if case.dtype == torch.float32 else 4e-3
        for mine, theirs, repeated in zip(want, found, again, strict=True):
            assert torch.equal(theirs, repeated)
            assert float((theirs.float() - mine.float()).norm() / mine.float().norm()) < rounding


def test_steps_in_a_graph():
    """A captured step of a padded batch replays with what was written since, at lengths and pages of another step."""
    case = CASES["K4V4"]
    step = Step(case)
    step.write()
    pool, device = step.pools[DEVICE], torch.device(DEVICE)
    table, lengths = step.table[[0, 3, 4]].to(device), torch.tensor([20, 200, 500], dtype=torch.int32, device=device)
    heads, dim = case.kv_heads, case.key.dim
    query = step.normal(3, heads * case.group, dim).to(device, case.dtype)
    k, v = step.normal(3, 2 * heads, dim).to(device, case.dtype).split(heads, dim=1)  # with gaps, as vLLM's are
    slots = torch.full((16,), -1, dtype=torch.int32, device=device)
    buffers, output = RowBuffers(3), torch.zeros_like(query)
    [run], _ = split_runs([0, 1, 2, 3], 1)

    def launch() -> None:
        pool.write(k, v, slots)
        UniformCall(run, rows).attend(pool, query, output, case.options, None)

    rows = buffers.rows(run, PagedRows(table, lengths))
    launch()
    with GraphPool().capture(device) as graph:
        launch()
    lengths = torch.tensor([33, 257, 700], dtype=torch.int32, device=device)
    place = (lengths - 1).long()
    slots[:3] = table[torch.arange(3, device=device), place // case.page_size] * case.page_size + place % case.page_size
    buffers.rows(run, PagedRows(table, lengths))
    before = output.clone()
    graph.replay()
    replayed = output.clone()
    launch()
    assert torch.equal(replayed, output) and not torch.equal(replayed, before)


class WindowStep:
    """A layer with a window on two devices, and the tokens of its steps."""

    def __init__(self, case: PagedCase) -> None:
        self.step, size = Step(case), case.page_size
        self.spec, self.size = WindowSpec(window=100, sinks=4, block=size), size
        self.tables, width = {}, self.step.table.shape[1]
        for device, pool in self.step.pools.items():
            shape = self.spec.tokens(len(LENGTHS)), case.kv_heads, case.key.dim
            empty = torch.full(shape, torch.nan, dtype=case.dtype, device=device)
            pool.hot = HotPool(empty, empty.clone(), first=True)
            filled = torch.full((2048,), -1, dtype=torch.int32, device=pool.device)
            kind = HotTables if device == "cpu" else KernelTables
            self.tables[device] = kind(self.spec, blocks=BLOCKS, requests=len(LENGTHS), filled=filled, width=width)

    def write(self, lengths: list[int], counts: list[int]) -> None:
        """Writes the last tokens of sequences, of the same bytes on both devices."""
        step, case, slots = self.step, self.step.case, []
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            position = torch.arange(length - count, length)
            slots.append(step.table[row, position // self.size].long() * self.size + position % self.size)
        shape = sum(counts), case.kv_heads, case.key.dim
        k, v = (step.normal(*shape).to(case.dtype) for _ in range(2))
        for device, pool in step.pools.items():
            ends = torch.tensor(lengths, dtype=torch.int32, device=device)
            places = self.tables[device].update(step.table.to(device), ends, torch.cat(slots).to(device))
            with jax_on(device):
                pool.write(k.to(device), v.to(device), torch.cat(slots).to(device), places)
        leaves = [jax.tree.leaves(step.pools[device].pages) for device in ("cpu", DEVICE)]
        for mine, theirs in zip(*leaves, strict=True):
            mine.copy_(theirs)

    def rows(self, device: str, lengths: list[int]) -> PagedRows:
        given = torch.tensor(lengths, dtype=torch.int32, device=device)
        return self.tables[device].read(self.step.table.to(device), given)


@pytest.mark.parametrize("name", ["K4V4", "K4V4, statistics, sinks", "K3V3, window, cap", "K8V4, float32"])
def test_windows(name):
    """Sequences written in chunks and token by token; queries of each."""
    case = CASES[name]
    layer, lengths = WindowStep(case), [33, 1, 5, 257, 690]
    layer.write(lengths, lengths)
    for count in (1, 1, 5):
        lengths = [length + count for length in lengths]
        layer.write(lengths, [count] * len(lengths))
    heads, sinks = case.kv_heads * case.group, layer.step.sinks
    found = {}
    for device, pool in layer.step.pools.items():
        layer.step.random.manual_seed(1)
        rows = layer.rows(device, lengths).map(lambda x: x[:5])
        few = layer.step.normal(5, 3, heads, case.key.dim).to(device, case.dtype)
        given = None if sinks is None else sinks.to(device)
        with jax_on(device):
            found[device] = (
                pool.attend(few[:, :1], rows, case.options, given),
                pool.attend(few, rows, case.options, given),
            )
            assert torch.equal(pool.attend(few, rows, case.options, given), found[device][1])
    assert int(layer.tables["cpu"].cold_reads) == int(layer.tables[DEVICE].cold_reads)
    for want, got in zip(found["cpu"], found[DEVICE], strict=True):
        assert float((got.cpu().float() - want.float()).norm() / want.float().norm()) < 3 * case.tolerance


def test_steps_with_a_window_in_a_graph():
    """A captured step of a padded batch replays with the blocks of another step."""
    case = CASES["K4V4"]
    layer, device = WindowStep(case), torch.device(DEVICE)
    layer.write([20, 1, 5, 200, 500], [20, 1, 5, 200, 500])
    pool, buffers = layer.step.pools[DEVICE], RowBuffers(5)
    query = layer.step.normal(5, case.kv_heads * case.group, case.key.dim).to(device, case.dtype)
    output = torch.zeros_like(query)
    [run], _ = split_runs([0, 1, 2, 3, 4, 5], 1)

    def launch() -> None:
        UniformCall(run, rows).attend(pool, query, output, case.options, None)

    rows = buffers.rows(run, layer.rows(DEVICE, [20, 1, 5, 200, 500]))
    launch()
    with GraphPool().capture(device) as graph:
        launch()
    layer.write([33, 2, 0, 257, 700], [13, 1, 0, 57, 200])
    again = buffers.rows(run, layer.rows(DEVICE, [33, 2, 0, 257, 700]))
    assert [x.data_ptr() for x in again.tensors] == [x.data_ptr() for x in rows.tensors]
    before = output.clone()
    graph.replay()
    replayed = output.clone()
    launch()
    assert torch.equal(replayed, output) and not torch.equal(replayed, before) and not output[2].any()


@pytest.mark.parametrize(
    ("spec", "requests"),
    [
        (WindowSpec(128, 4, 64), 256),
        (WindowSpec(100, 0, 32), 1024),
        (WindowSpec(0, 4, 64), 3),
        (WindowSpec(9, 1, 4), 40),
    ],
)
def test_hot_tables_are_those_of_torch(spec, requests):
    """Kernels and torch operations on the same GPU: prompts, steps of one and of several tokens, few and all requests.

    Every table is equal, and so is what every request reads.
    """
    draw, size, most, width = torch.Generator().manual_seed(0), spec.block, 2048, 40
    blocks = requests * width + 1
    mine, want = (
        kind(
            spec, blocks=blocks, requests=requests, width=width,
            filled=torch.full((most,), -1, dtype=torch.int32, device=DEVICE),
        )
        for kind in (KernelTables, HotTables)
    )  # fmt: skip
    table = (torch.randperm(blocks - 1, generator=draw)[: requests * width] + 1).view(requests, width).int()
    lengths = torch.zeros(requests, dtype=torch.int64)
    kept = None
    for step in range(120):
        tokens = min((1, 1, 3, most // requests, size)[step % 5], width * size)
        together = min(requests, max(most // tokens, 1), (requests, 1, max(requests // 3, 1))[step % 3])
        rows = torch.arange(requests)[:together] if step % 2 else torch.arange(requests)[-together:]
        lengths[rows] = torch.where(lengths[rows] + tokens > width * size, 0, lengths[rows])
        before, after = lengths[rows], lengths[rows] + tokens
        lengths[rows] = after
        position = before[:, None] + torch.arange(tokens)
        slots = table[rows].long().gather(1, position // size) * size + position % size
        slots = torch.cat([slots.flatten(), torch.full((step % 4,), -1)]).to(DEVICE)[:most]
        padding = step % 2 * min(2, requests - together)  # as a graph of a larger batch has it
        given = torch.cat([table[rows], table[:padding]]).to(DEVICE)
        ends = torch.cat([after, torch.zeros(padding, dtype=torch.int64)]).int().to(DEVICE)
        places = [tables.update(given, ends, slots) for tables in (mine, want)]
        assert torch.equal(*places)
        first = len(ends) // 3
        for part in (slice(first, None), slice(None)):
            found, other = (tables.read(given[part], ends[part]) for tables in (mine, want))
            real = len(ends[part])
            for one, two in zip(found.tensors, other.tensors, strict=True):
                assert torch.equal(one[:real], two[:real]) and (one.dim() == 2 or torch.equal(one, two))
        for name in ("_hot", "_owner", "_used"):
            assert torch.equal(getattr(mine, name)[:-1].long(), getattr(want, name)[:-1]), (step, name)
        assert torch.equal(mine._filled, want._filled)
        pointers = [x.data_ptr() for x in (*found.exact.tensors, found.table, places[0])]
        assert kept in (None, pointers)
        kept = pointers
    assert int(mine.cold_reads) == int(want.cold_reads)
