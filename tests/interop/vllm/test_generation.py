"""Real generation by vLLM over compressed pages: the tokens of our own torch cache, whatever the schedule."""

import pytest

pytest.importorskip("vllm")

from vllm_engines import NEW, PROMPTS, answers, greedy, layers_of, own_answers, running

import tq_jax as tq

pytestmark = pytest.mark.filterwarnings("default")

POOL = 1 << 22
CODES, DENSE = 16 + 16 + 2 + 2, 2 * 32 * 4
"""Bytes of a head and token: 4-bit codes of 32 channels with their scales, and float32."""


@pytest.fixture(scope="module")
def expected(two_layers, prompts):
    return own_answers(two_layers, prompts)


class TestOneEngine:
    @pytest.fixture(scope="class")
    def engine(self, two_layers):
        with running(two_layers, {"key_bits": 4, "value_bits": 4}, kv_cache_memory_bytes=POOL) as engine:
            yield engine

    def test_tokens_are_those_of_our_cache(self, engine, prompts, expected):
        """One batch of ragged prompts; every layer is called for every token, and holds nothing but codes."""
        before = layers_of(engine)
        found, cached = answers(engine, prompts)
        assert [one[0] for one in found] == expected
        assert cached == [0] * len(prompts)
        tokens = sum(PROMPTS) + len(PROMPTS) * (NEW - 1)
        for (name, *old, shape), (_, *new, _) in zip(before, layers_of(engine), strict=True):
            assert name == "TurboQuantImpl" and shape[1:3] == (2, 32) and shape[3] * 4 == CODES
            assert [b - a for a, b in zip(old, new, strict=True)] == [tokens, tokens]

    def test_capacity(self, engine):
        """Blocks of both layers, 2 heads and 32 tokens: as many as codes fit."""
        blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
        assert blocks == pytest.approx(POOL / (2 * 2 * 32 * DENSE) * DENSE / CODES, rel=0.02)

    def test_prefix_cache_hits(self, engine, prompts, expected):
        """The first two prompts have a whole block each that the cache knows by now."""
        found, cached = answers(engine, prompts)
        assert [one[0] for one in found] == expected
        assert cached == [32, 32, 0, 32]

    def test_samples_share_a_prompt(self, engine, prompts):
        first, _ = answers(engine, prompts[:2], n=3, temperature=1.0, seed=5)
        again, _ = answers(engine, prompts[:2], n=3, temperature=1.0, seed=5)
        assert first == again
        assert all(len({tuple(sample) for sample in one}) == 3 for one in first)

    def test_beams(self, engine, prompts, expected):
        from vllm.sampling_params import BeamSearchParams

        def beams(width):
            given = BeamSearchParams(beam_width=width, max_tokens=8, ignore_eos=True)
            [found] = engine.beam_search([{"prompt_token_ids": prompts[0]}], given)
            return [(x.tokens[len(prompts[0]) :], x.cum_logprob) for x in found.sequences]

        assert beams(1)[0][0] == expected[0][:8]
        several = beams(3)
        assert len({tuple(tokens) for tokens, _ in several}) == 3
        assert several[0][1] >= beams(1)[0][1] - 1e-3


def test_chunks_and_preemption_change_nothing(two_layers, prompts, expected):
    """Prompts in chunks of 16 tokens between the tokens of others; and memory for hardly more than two requests."""
    arguments = dict(max_model_len=96, max_num_batched_tokens=16, max_num_seqs=4, num_gpu_blocks_override=6)
    with running(two_layers, {}, enable_prefix_caching=False, disable_log_stats=False, **arguments) as engine:
        assert greedy(engine, prompts) == expected
        preempted = [x.value for x in engine.get_metrics() if x.name == "vllm:num_preemptions"]
        assert preempted[0] > 0
        tokens = sum(PROMPTS) + len(PROMPTS) * (NEW - 1)
        assert all(written > tokens for _, written, _, _ in layers_of(engine))  # those of the preempted, twice


@pytest.fixture(scope="module")
def statistics(four_layers, tmp_path_factory):
    import torch
    import transformers

    from interop.calibrate import calibrate

    path = str(tmp_path_factory.mktemp("statistics") / "keys.npz")
    ids = torch.randint(5, 199, (2, 100), generator=torch.Generator().manual_seed(2))
    calibrate(transformers.AutoModelForCausalLM.from_pretrained(four_layers, dtype=torch.float32), ids, path)
    return path


def test_boundary_layers_and_statistics(four_layers, statistics, prompts, caplog):
    """First and last layer in vLLM's own attention; keys of the others centred and weighted by a file."""
    options = {"key_bits": 3, "search": False, "boundary_layers": 1, "seed": 3, "statistics": statistics}
    with running(four_layers, options) as engine:
        own = dict(key=tq.QuantizerSpec(32, 3), value=tq.QuantizerSpec(32, 4), seed=3, exact_layers=(0, 3))
        found = greedy(engine, prompts)
        assert found == own_answers(four_layers, prompts, statistics=statistics, **own)
        assert found[0] != own_answers(four_layers, prompts[:1], **own)[0]
        names, written, _, shapes = zip(*layers_of(engine), strict=True)
        assert names == ("CPUAttentionBackendImpl", "TurboQuantImpl", "TurboQuantImpl", "CPUAttentionBackendImpl")
        assert written[1] == written[2] > 0 and [4 * shape[3] for shape in shapes] == [256, 32, 32, 256]
        blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
        assert blocks == pytest.approx(POOL / (2 * 32 * (2 * 256 + 2 * 32)), rel=0.02)
    assert (
        "tq_jax compresses 2 of 4 layers [1, 2] to K3/V4 (32 instead of 256 bytes a head and token), keys centred and "
        f"weighted by {statistics}; the others stay in full precision. The same memory holds 1.78 times as many tokens"
    ) in caplog.messages
