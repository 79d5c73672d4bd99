"""Real generation by vLLM over compressed pages: the tokens of our own torch cache, whatever the schedule."""

import pytest

pytest.importorskip("vllm")

import torch
from vllm_engines import NEW, PROMPTS, answers, layers_of, running

pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # by vLLM

POOL = 1 << 22
CODES, DENSE = 16 + 16 + 2 + 2, 2 * 32 * 4
"""Bytes per head and token: 4-bit codes of 32 channels with their scales, and float32."""


@pytest.fixture(scope="module")
def engine(two_layers):
    with running(two_layers, {"key_bits": 4, "value_bits": 4}, kv_cache_memory_bytes=POOL) as engine:
        yield engine


def test_tokens_are_those_of_our_cache(engine, prompts, expected):
    """One batch of ragged prompts; every layer is called for every token, and holds nothing but codes."""
    before = layers_of(engine)
    found, cached = answers(engine, prompts)
    assert [one[0] for one in found] == expected
    assert cached == [0] * len(prompts)
    tokens = sum(PROMPTS) + len(PROMPTS) * (NEW - 1)
    for (name, *old, shape), (_, *new, _) in zip(before, layers_of(engine), strict=True):
        assert name == "TurboQuantImpl" and shape[1:3] == (2, 32) and shape[3] * 4 == CODES
        assert [b - a for a, b in zip(old, new, strict=True)] == [tokens, tokens]


def test_capacity(engine):
    """Blocks of both layers, 2 heads and 32 tokens: as many as codes fit."""
    blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert blocks == pytest.approx(POOL / (2 * 2 * 32 * DENSE) * DENSE / CODES, rel=0.02)


def test_samples_share_a_prompt(engine, prompts):
    first, _ = answers(engine, prompts[:2], n=3, temperature=1.0, seed=5)
    again, _ = answers(engine, prompts[:2], n=3, temperature=1.0, seed=5)
    assert first == again
    assert all(len({tuple(sample) for sample in one}) == 3 for one in first)


def test_beams(engine, prompts, expected):
    from vllm.sampling_params import BeamSearchParams

    def beams(width):
        given = BeamSearchParams(beam_width=width, max_tokens=8, ignore_eos=True)
        with torch.compiler.set_stance("force_eager"):  # vLLM would compile how it ranks log-probabilities
            [found] = engine.beam_search([{"prompt_token_ids": prompts[0]}], given)
        return [(x.tokens[len(prompts[0]) :], x.cum_logprob) for x in found.sequences]

    assert beams(1)[0][0] == expected[0][:8]
    several = beams(3)
    assert len({tuple(tokens) for tokens, _ in several}) == 3
    assert several[0][1] >= beams(1)[0][1] - 1e-3
