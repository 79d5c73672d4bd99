"""Engines with a window in full precision: tokens, log-probabilities, cold reads."""

import pytest

pytest.importorskip("vllm")

import torch
from vllm_engines import PRECISE, SAME, VOCABULARY, answers, cold_reads, greedy, running

pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # by vLLM

WINDOW = {"window": 40, "sinks": 4}
COARSE = {"key_bits": 3, "value_bits": 3}


def test_tokens_and_prefix_hits(two_layers, prompts, precise, said):
    """Tokens of an engine without a window; a prefix hit finds its blocks where they are."""
    with running(two_layers, PRECISE | WINDOW, max_num_seqs=4) as engine:
        assert [one[0] for one in answers(engine, prompts, max_tokens=SAME)[0]] == precise
        assert cold_reads(engine) == 0
        found, cached = answers(engine, prompts, max_tokens=SAME)
        assert [one[0] for one in found] == precise and cached == [32, 32, 0, 32]
        assert cold_reads(engine) == 0
        found, _ = answers(engine, prompts[:2], n=3, temperature=1e-3, seed=1, max_tokens=SAME)
        assert found == [[one] * 3 for one in precise[:2]]
    assert any("latest 40 tokens and the first 4" in message for message in said)


def test_chunks_and_preemption(two_layers, prompts, precise):
    """Prompts in chunks between the tokens of others, and too little memory for all requests."""
    arguments = dict(max_model_len=96, max_num_batched_tokens=16, max_num_seqs=4, num_gpu_blocks_override=6)
    with running(two_layers, PRECISE | WINDOW, disable_log_stats=False, **arguments) as engine:
        assert [tokens[:SAME] for tokens in greedy(engine, prompts)] == precise
        assert next(x.value for x in engine.get_metrics() if x.name == "vllm:num_preemptions") > 0


@pytest.fixture(scope="module")
def texts():
    """Token ids; several times as many as a window."""
    return torch.randint(5, VOCABULARY, (2, 200), generator=torch.Generator().manual_seed(3)).tolist()


def prompt_log_probabilities(engine, texts):
    found, _ = engine.generate([{"prompt_token_ids": ids} for ids in texts], sampling(), use_tqdm=False), None
    return torch.tensor(
        [
            [one[token].logprob for one, token in zip(x.prompt_logprobs[1:], ids[1:], strict=True)]
            for x, ids in zip(found, texts, strict=True)
        ]
    )


def sampling():
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


@pytest.fixture(scope="module")
def exact(two_layers, texts):
    """Log-probabilities by vLLM's own attention."""
    with running(two_layers, {"boundary_layers": 1}) as engine:
        return prompt_log_probabilities(engine, texts)


@pytest.mark.parametrize("tokens", [1, 32])
def test_log_probabilities(two_layers, texts, exact, tokens):
    """Text read token by token, as in decoding, and in chunks: the window brings it much closer to full precision."""
    errors = []
    for window in ({}, WINDOW):
        arguments = dict(max_num_seqs=1, max_num_batched_tokens=tokens, enable_prefix_caching=False)
        with running(two_layers, COARSE | window, **arguments) as engine:
            found = prompt_log_probabilities(engine, texts)
            errors.append(float((found - exact).square().mean()))
            assert cold_reads(engine) == 0
    assert errors[1] < errors[0] / 2, errors
