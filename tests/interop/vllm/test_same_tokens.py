"""Tokens over codes of 8 bits are those of vLLM's own attention, whatever the schedule, for samples and for beams."""

import pytest

pytest.importorskip("vllm")

import torch
from vllm_engines import PRECISE, SAME, answers, running

pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # by vLLM

BEAM, BEAMS, SAMPLES = 8, 4, 4
"""Tokens of a beam; beams; samples of a prompt."""

SCHEDULES = {
    "chunks": {"max_num_batched_tokens": 16},
    "chunks and preemption": {"max_num_batched_tokens": 16, "max_model_len": 96, "num_gpu_blocks_override": 6},
}


def texts(engine, prompts):
    """Greedy tokens twice, samples that share a prompt, and beams; and how many tokens came from the prefix cache."""
    from vllm.sampling_params import BeamSearchParams

    first, _ = answers(engine, prompts, max_tokens=SAME)
    again, cached = answers(engine, prompts, max_tokens=SAME)
    samples, _ = answers(engine, prompts, n=SAMPLES, temperature=1.0, top_k=1, max_tokens=SAME)
    given = BeamSearchParams(beam_width=BEAMS, max_tokens=BEAM, ignore_eos=True)
    with torch.compiler.set_stance("force_eager"):  # vLLM would compile how it ranks log-probabilities
        found = engine.beam_search([{"prompt_token_ids": ids} for ids in prompts], given)
    beams = [[x.tokens[len(ids) :] for x in one.sequences] for ids, one in zip(prompts, found, strict=True)]
    return {"greedy": first, "after a hit": again, "samples": samples, "beams": beams}, cached


@pytest.fixture(scope="module")
def full_precision(two_layers, prompts):
    with running(two_layers, None) as engine:
        found, _ = texts(engine, prompts)
    assert found["samples"] == [one * SAMPLES for one in found["greedy"]]
    assert all(len(set(map(tuple, one))) == BEAMS for one in found["beams"])
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_are_those_of_full_precision(two_layers, prompts, full_precision, schedule):
    arguments = {"max_num_seqs": 4, "disable_log_stats": False} | SCHEDULES[schedule]
    with running(two_layers, PRECISE, **arguments) as engine:
        found, cached = texts(engine, prompts)
        counts = {x.name: getattr(x, "value", None) for x in engine.get_metrics()}
    assert found == full_precision
    assert (counts["vllm:num_preemptions"] > 0) == ("preemption" in schedule)
    assert "preemption" in schedule or cached == [32, 32, 0, 32]  # blocks of a full cache are taken by others
