"""A thousand short requests in one engine, with cancellations, preemptions, prefix hits and prompts in pieces."""

import collections
import dataclasses
import random

import pytest

pytest.importorskip("vllm")

from vllm_engines import VOCABULARY, answers, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),  # by vLLM
]

REQUESTS, KINDS, TOGETHER, CANCELLED = 1000, 48, 20, 0.15
"""Requests, how many of them differ, how many are in the engine at a time, and the share that is cancelled."""

ENGINE = dict(
    max_model_len=128, max_num_seqs=16, max_num_batched_tokens=128, num_gpu_blocks_override=20, async_scheduling=False,
    disable_log_stats=False,
)  # fmt: skip
"""Sixteen requests of up to four blocks each run over 19 blocks."""


@pytest.fixture(scope="module")
def kinds():
    """Pairs of a prompt, which may share one or two blocks with others, and the number of tokens to generate."""
    draw = random.Random(0)
    stems = [[draw.randrange(5, VOCABULARY) for _ in range(64)] for _ in range(4)]
    found = []
    for _ in range(KINDS):
        stem = draw.choice(stems)[: draw.choice([0, 0, 32, 64])]
        found.append((stem + [draw.randrange(5, VOCABULARY) for _ in range(draw.randint(1, 40))], draw.randint(4, 16)))
    return found


@dataclasses.dataclass
class Soak:
    """What came of the requests.

    Attributes:
        kind: Index of each request's prompt, by its name.
        finished: Tokens of the requests that ended by themselves.
        cancelled: Names of the requests that were cancelled.
        hits: Names of the requests that took tokens from the prefix cache.
        again: Names of the requests that were preempted, or whose prompts ran in pieces.
    """

    kind: dict[str, int]
    finished: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    cancelled: set[str] = dataclasses.field(default_factory=set)
    hits: set[str] = dataclasses.field(default_factory=set)
    again: set[str] = dataclasses.field(default_factory=set)


def scheduler_of(engine):
    return engine.llm_engine.engine_core.engine_core.scheduler


def soak(engine, kinds):
    """Runs the requests; some are cancelled when they have a given number of tokens, from none to all but one."""
    from vllm import SamplingParams

    draw, core, scheduler = random.Random(1), engine.llm_engine, scheduler_of(engine)
    found = Soak({str(i): draw.randrange(len(kinds)) for i in range(REQUESTS)})
    stops = {name: draw.randrange(kinds[k][1]) for name, k in found.kind.items() if draw.random() < CANCELLED}
    waiting, live = collections.deque(found.kind), {}
    while waiting or live:
        while waiting and len(live) < TOGETHER:
            name = waiting.popleft()
            ids, count = kinds[found.kind[name]]
            sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            core.add_request(name, {"prompt_token_ids": ids}, sampling)
            live[name] = 0
        for one in core.step():
            live[one.request_id] = len(one.outputs[0].token_ids)
            found.hits |= {one.request_id} if one.num_cached_tokens else set()
            if one.finished:
                found.finished[one.request_id] = list(one.outputs[0].token_ids)
                del live[one.request_id]
        for request in scheduler.requests.values():
            if request.num_preemptions or 0 < request.num_computed_tokens < request.num_prompt_tokens:
                found.again.add(request.request_id.partition("-")[0])
        stopped = [name for name, count in live.items() if count >= stops.get(name, count + 1)]
        core.abort_request(stopped)
        found.cancelled.update(stopped)
        live = {name: count for name, count in live.items() if name not in stopped}
    return found


def run(engine, kinds):
    """The tokens of each prompt alone in the engine, and the soak; nothing is left in the engine after either."""
    pool = scheduler_of(engine).kv_cache_manager.block_pool
    free, alone = pool.get_num_free_blocks(), []
    for ids, count in kinds:
        assert engine.reset_prefix_cache()  # only if no block is in use
        [[[tokens]], [cached]] = answers(engine, [ids], max_tokens=count)
        assert cached == 0
        alone.append(tokens)
    assert engine.reset_prefix_cache()
    found = soak(engine, kinds)
    assert not scheduler_of(engine).requests and not engine.llm_engine.has_unfinished_requests()
    assert pool.get_num_free_blocks() == free == ENGINE["num_gpu_blocks_override"] - 1  # one block is never used
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)
    counts = {x.name: getattr(x, "value", None) for x in engine.get_metrics()}
    assert counts["vllm:num_preemptions"] > 30 and len(found.hits) > 250 and len(found.again) > 50
    return alone, found


@pytest.mark.parametrize("options", [None, {"key_bits": 4, "value_bits": 4, "search": False}], ids=["own", "k4v4"])
def test_no_request_and_no_block_is_lost(two_layers, kinds, options):
    """The text is that of the prompt alone: by vLLM's own attention always, so that it does not depend on the batch.

    Over codes it is the same unless a prompt ran in another way: after a prefix hit, in pieces, or again after
    preemption, its tokens read earlier ones from codes, which alone they see as they are.
    """
    with running(two_layers, options, **ENGINE) as engine:
        alone, found = run(engine, kinds)
    assert len({tuple(tokens) for tokens in alone}) > KINDS * 0.9  # texts depend on their prompts
    assert not found.finished.keys() & found.cancelled
    assert found.finished.keys() | found.cancelled == found.kind.keys()
    assert len(found.cancelled) > 100
    same = {name for name, tokens in found.finished.items() if tokens == alone[found.kind[name]]}
    assert all(len(tokens) == kinds[found.kind[name]][1] for name, tokens in found.finished.items())
    differently = set() if options is None else found.hits | found.again
    assert len(found.finished.keys() - differently) > 200
    assert same >= found.finished.keys() - differently
