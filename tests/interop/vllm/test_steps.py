"""Steps of any mix of requests: what a layer writes and attends to, against plain attention."""

import dataclasses
import itertools
import types

import pytest

pytest.importorskip("vllm")

import jax
import torch
from window_model import Model

import tq_jax as tq
from interop.torch import jax_calls
from interop.torch.dlpack import to_jax, to_torch
from interop.vllm.window import WindowSpec

dequantize = jax.jit(tq.dequantize)

D, PAGE, HEADS, KV_HEADS, BLOCKS, WIDTH = 32, 32, 4, 2, 60, 12
OPTIONS = {
    "plain": {},
    "window, cap, sinks": {
        "sliding_window": 40,
        "logits_soft_cap": 2.0,
        "sinks": torch.linspace(-1, 2, HEADS).bfloat16(),
    },
}


WINDOW = {"window": 70, "sinks": 3}


def make_config(**window):
    from vllm.config import AttentionConfig, VllmConfig

    options = {"search": False, "window": 0, "sinks": 0} | window
    return VllmConfig(attention_config=AttentionConfig(backend="CUSTOM"), additional_config={"tq_jax": options})


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def windowed():
    return make_config(**WINDOW)


def make_builder(drafts, options=None):
    """A builder of an engine whose requests have so many draft tokens."""
    from interop.vllm import metadata

    settings = types.SimpleNamespace(
        model_config=None,
        cache_config=types.SimpleNamespace(num_gpu_blocks=BLOCKS, block_size=PAGE),
        additional_config=options or {"tq_jax": {"window": 0, "sinks": 0}},
        speculative_config=types.SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False),
        use_v2_model_runner=True,
        parallel_config=types.SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=types.SimpleNamespace(max_num_seqs=6, max_num_batched_tokens=400),
    )
    sizes = {"num_kv_heads": KV_HEADS, "head_size": D, "dtype": torch.float32}
    spec = types.SimpleNamespace(state_content_bytes=36, block_size=PAGE, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "report", lambda config: None)
        return metadata.TurboQuantBuilder(spec, ["layer"], settings, torch.device("cpu"))


@dataclasses.dataclass
class Request:
    """Blocks of a request, its keys and values, and what their codes stand for."""

    blocks: list
    keys: torch.Tensor
    values: torch.Tensor
    key_codes: torch.Tensor
    value_codes: torch.Tensor

    def add(self, *new):
        names = ("keys", "values", "key_codes", "value_codes")
        for name, tokens in zip(names, new, strict=True):
            setattr(self, name, torch.cat([getattr(self, name), tokens]))


class Layer:
    """One layer of an engine, and what the codes of its requests stand for."""

    def __init__(self, config, *, drafts=0, seed=0, **options):
        from vllm.config import set_current_vllm_config

        from interop.vllm.backend import TurboQuantImpl

        with set_current_vllm_config(config):
            self.impl = TurboQuantImpl(HEADS, D, D**-0.5, KV_HEADS, **options)
        self.builder, self.options = make_builder(drafts, config.additional_config), options
        spec = WindowSpec.of(self.impl.options, PAGE)
        self.model = None if spec is None else Model(spec, 6)
        self.memory = torch.full((BLOCKS, KV_HEADS, PAGE, 36), 255, dtype=torch.uint8)  # scales are NaN
        self.quantizers = (
            tq.make_quantizer(tq.QuantizerSpec(D, 4, scale="unbiased"), seed=0),
            tq.make_quantizer(tq.QuantizerSpec(D, 4), seed=1),
        )
        self.random = torch.Generator().manual_seed(seed)
        self.tokens = {}
        self.blocks = list(range(1, BLOCKS))

    def step(self, requests, *, padded=None):
        """Outputs of a step of (name, new tokens), and those of plain attention.

        `padded` is the number of requests of a uniform step that a CUDA graph was captured for.
        """
        from vllm.v1.attention.backend import CommonAttentionMetadata

        counts = [count for _, count in requests]
        more = 0 if padded is None else padded - len(counts)
        starts = [0, *itertools.accumulate(counts)]
        starts += [starts[-1]] * more
        total = starts[-1] + more * counts[0]
        query = torch.randn(total, HEADS, D, generator=self.random)
        key, value = torch.randn(2, total, KV_HEADS, D, generator=self.random)
        real = sum(counts)  # what is written; a batch of another size rounds some scales in another way
        decoded = self.decoded(key[:real], value[:real])
        slots, lengths = torch.full((total,), -1), [0] * (len(counts) + more)
        table = torch.zeros(len(counts) + more, WIDTH, dtype=torch.int32)
        want = torch.full((total, HEADS, D), torch.nan)
        for row, (name, count) in enumerate(requests):
            part = slice(starts[row], starts[row + 1])
            request = self.tokens.setdefault(name, Request([], key[:0], value[:0], key[:0], value[:0]))
            before, lengths[row] = len(request.keys), len(request.keys) + count
            while len(request.blocks) * PAGE < lengths[row]:
                request.blocks.append(self.blocks.pop())
            request.add(key[part], value[part], *(x[part] for x in decoded))
            blocks = request.blocks
            position = torch.arange(before, lengths[row])
            table[row, : len(blocks)] = torch.tensor(blocks)
            slots[part] = table[row, position // PAGE].long() * PAGE + position % PAGE
        if self.model is not None:
            begun = set((slots[(slots >= 0) & (slots % PAGE == 0)] // PAGE).tolist())
            rows = [(self.tokens[name].blocks, len(self.tokens[name].keys)) for name, _ in requests]
            self.model.update(rows, begun)
        begin, end = torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=begin, query_start_loc_cpu=begin.clone(), seq_lens=end, num_reqs=len(lengths),
            num_actual_tokens=total, max_query_len=max(counts), max_seq_len=max(lengths),
            block_table_tensor=table, slot_mapping=slots, seq_lens_cpu_upper_bound=end.clone(),
        )  # fmt: skip
        metadata = self.builder.build(0, common)
        self.write(key, value, metadata, slots)
        for row, (name, count) in enumerate(requests):
            part = slice(starts[row], starts[row + 1])
            want[part] = self.reference(query[part], *self.read(self.tokens[name], count))
        output = torch.full((total, HEADS, D), torch.nan)
        self.impl.forward(None, query, key, value, self.memory, metadata, output)
        return output[: starts[-1]], want[: starts[-1]], metadata

    def decoded(self, *tokens):
        """What the codes of keys and values stand for."""
        codes = jax_calls.encode_tokens(*self.quantizers, *tokens)
        # Padded, so that few functions are compiled.
        padded = [jax.tree.map(lambda x: torch.cat([x, x[:1].expand(512 - len(x), *x.shape[1:])]), c) for c in codes]
        return [
            to_torch(dequantize(q, to_jax(c)))[: len(tokens[0])] for q, c in zip(self.quantizers, padded, strict=True)
        ]

    def write(self, key, value, metadata, slots):
        """Writes as vLLM does, with the metadata of the layer in its context."""
        from vllm.forward_context import override_forward_context

        if self.impl._pool is None and self.model is not None:
            self.impl._reserve(PAGE, key)
            for pool in (self.impl._hot.keys, self.impl._hot.values):
                pool.fill_(torch.nan)
        with override_forward_context(types.SimpleNamespace(attn_metadata={"layer": metadata})):
            self.impl.do_kv_cache_update(types.SimpleNamespace(layer_name="layer"), key, value, self.memory, slots)

    def read(self, request, count):
        """Keys and values that the latest `count` tokens of a request attend to."""
        length = len(request.keys)
        few = count <= self.builder.reorder_batch_threshold
        length -= 0 if few else count
        begin, stop = (0, length) if self.model is None else self.model.read(request.blocks, length)
        exact = ((0, begin), (stop, len(request.keys)))
        keys, values = request.key_codes.clone(), request.value_codes.clone()
        for part in (slice(*pair) for pair in exact):
            keys[part], values[part] = request.keys[part], request.values[part]
        return keys, values

    def reference(self, query, keys, values):
        before = len(keys) - len(query)
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
        logits = torch.einsum("nhd,mhd->hnm", query, keys) * D**-0.5
        cap, window, sinks = (self.options.get(x) for x in ("logits_soft_cap", "sliding_window", "sinks"))
        if cap:
            logits = cap * torch.tanh(logits / cap)
        age = before + torch.arange(len(query))[:, None] - torch.arange(len(keys))
        logits = logits.masked_fill((age < 0) | (age >= (window or 10**6)), -torch.inf)
        extra = torch.full((HEADS, len(query), 1), -torch.inf) if sinks is None else sinks.float()[:, None, None]
        weights = torch.cat([logits, extra.expand(-1, len(query), 1)], -1).softmax(-1)[..., :-1]
        return torch.einsum("hnm,mhd->nhd", weights, values)


def assert_close(found, want):
    torch.testing.assert_close(found, want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("given", ["config", "windowed"])
def test_any_mix_of_requests(given, name, drafts, request):
    """Decoding requests first, with and without drafts, then first and later chunks of prompts."""
    layer = Layer(request.getfixturevalue(given), drafts=drafts, **OPTIONS[name])
    few = 1 + drafts
    for step in (
        [("a", 60), ("b", 33), ("c", 9)],
        [("a", few), ("c", few), ("b", 40), ("d", 290)],
        [("a", 1), ("b", 1), ("c", 1), ("d", 6), ("e", 7)],
        [("a", few), ("b", few), ("c", 1), ("e", 1), ("d", 5)],
        [("d", 21), ("e", 5)],
        [("a", few), ("b", few), ("c", few), ("d", few), ("e", few)],
    ):
        found, want, metadata = layer.step(step)
        assert_close(found, want)
        calls = [(call.run.requests, call.run.queries) for call in metadata.uniform]
        uniform = [count for _, count in step if count <= few]
        assert calls == [(len(list(same)), count) for count, same in itertools.groupby(uniform)]
        assert (not metadata.prompts) == (len(uniform) == len(step))


@pytest.mark.parametrize("seed", range(8))
def test_random_mixes(config, seed):
    window = {0: config, 1: make_config(window=33, sinks=32), 2: make_config(window=0), 3: make_config(window=5)}
    layer = Layer(window[seed % 4], seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(6):
        counts = torch.randint(1, 30, (5,), generator=draw).tolist()
        decoding = torch.randint(0, 2, (5,), generator=draw).bool().tolist()
        known = [name for name in "abcde" if name in layer.tokens]
        names = [name for name, few in zip("abcde", decoding, strict=True) if few and name in known]
        others = [name for name in "abcde" if name not in names]
        step = [(name, 1) for name in names]
        step += sorted(((name, count) for name, count in zip(others, counts, strict=False)), key=lambda x: x[1])
        found, want, _ = layer.step(step)
        assert_close(found, want)


def test_first_chunks_read_no_codes(config, monkeypatch):
    from interop.torch.paged import PagedPool

    def refuse(*_, **__):
        raise AssertionError("read codes")

    layer = Layer(config)
    for name in ("attend", "dequantize"):
        monkeypatch.setattr(PagedPool, name, refuse)
    found, want, metadata = layer.step([("a", 40), ("b", 50)])
    assert_close(found, want)
    assert [chunks.earlier for chunks in metadata.prompts] == [None] and metadata.uniform == ()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_prompts_that_do_not_fit_the_dense_space_together(windowed, options):
    """A KV head at a time, and few prompts at a time."""
    layer = Layer(windowed, **options)
    layer.step([("a", 90), ("b", 50), ("c", 70), ("d", 8)])
    small = dataclasses.replace(layer.builder._space, elements=230 * D)
    layer.builder._space = layer.impl._attend_prompts.space = small
    found, want, metadata = layer.step([("a", 50), ("b", 33), ("e", 40), ("c", 20), ("d", 5)])
    assert_close(found, want)
    assert [len(chunks.starts) - 1 for chunks in metadata.prompts] == [2, 1, 2]
    assert [small.heads_at_once(x.earlier.count) for x in metadata.prompts if x.earlier] == [1, 2]


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("given", ["config", "windowed"])
def test_padded_steps(given, drafts, request):
    """A batch that a graph was captured for: padding writes and reads nothing; addresses stay."""
    layer, few = Layer(request.getfixturevalue(given), drafts=drafts), 1 + drafts
    layer.step([("a", 60), ("b", 33), ("c", 9)])
    seen = []
    for names in ("abc", "ab", "bca", "a"):
        found, want, metadata = layer.step([(name, few) for name in names], padded=6)
        assert_close(found, want)
        [call] = metadata.uniform
        assert call.run.requests == 6 and call.rows.lengths.tolist()[len(names) :] == [0] * (8 - len(names))
        places = [] if metadata.places is None else [metadata.places]
        seen.append(tuple(x.data_ptr() for x in (*call.rows.tensors, metadata.slots, *places)))
    assert len(set(seen)) == 1
    free = list(set(range(BLOCKS)) - {block for request in layer.tokens.values() for block in request.blocks})
    for leaf in jax.tree.leaves(layer.impl._pool.pages):
        assert bool((leaf[free].view(torch.uint8) == 255).all())


def test_whole_batches_are_views_of_the_tensors_of_vllm():
    from interop.torch.paged_rows import PagedRows
    from interop.vllm.calls import RowBuffers, split_runs

    table, lengths = torch.zeros(4, 3, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    [run], _ = split_runs([0, 2, 4, 6, 8], 2)
    rows = RowBuffers(8).rows(run, PagedRows(table, lengths))
    assert (rows.table.data_ptr(), rows.lengths.data_ptr()) == (table.data_ptr(), lengths.data_ptr())


def test_graphs_of_drafts():
    """More drafts than kernels take: graphs of single tokens only, and longer verifications are prompts."""
    from vllm.v1.attention.backend import AttentionCGSupport

    for drafts, support in ((0, "UNIFORM_BATCH"), (7, "UNIFORM_BATCH"), (8, "UNIFORM_SINGLE_TOKEN_DECODE")):
        builder = make_builder(drafts)
        assert builder.get_cudagraph_support(builder.vllm_config, None) == AttentionCGSupport[support]
        assert builder.reorder_batch_threshold == min(1 + drafts, 8)


def test_attention_compiles_while_the_first_write_waits(config, monkeypatch):
    """All batches of the step's number of queries, before the first write; a later step with others adds these."""
    from interop.torch.paged import PagedPool

    seen, layer = [], Layer(config, drafts=1)

    def note(name, method):
        def run(pool, *given, **options):
            seen.append((name, *given[1].shape[:2]) if name == "prepare_attend" else name)
            return method(pool, *given, **options)

        monkeypatch.setattr(PagedPool, name, run)

    for name in ("prepare_writes", "prepare_attend", "write", "attend"):
        note(name, getattr(PagedPool, name))
    for count in (1, 1, 2):
        layer.step([("a", count)])
    one, two = (("prepare_attend", 1, count) for count in (1, 2))
    assert seen == ["prepare_writes", one, *["write", "attend"] * 2, "write", two, "attend"]
