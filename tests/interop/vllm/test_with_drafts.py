"""Engines with drafts. Those found in the text import numba, after which no other engine starts properly in the same
process: by its name this file is the last of its folder."""

import concurrent.futures
import multiprocessing

import pytest

pytest.importorskip("vllm")

from vllm_engines import PRECISE, drafted, make_eagle

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),  # by vLLM
    pytest.mark.filterwarnings("ignore:\\nEncountered the use of a type that is scheduled for deprecation"),  # by vLLM
    pytest.mark.slow,
]

FULL, CODES = "CPUAttentionBackendImpl", "TurboQuantImpl"


@pytest.mark.families
def test_drafts_of_a_head(two_layers, prompts, precise, tmp_path):
    """EAGLE: the head reads the hidden states of the model and keeps its own tokens in full precision."""
    drafts = {"method": "eagle", "model": make_eagle(two_layers, tmp_path / "eagle")}
    tokens, counts, _ = drafted(two_layers, prompts, None, **drafts)
    assert tokens == precise and 0 < counts["accepted_tokens"] < counts["draft_tokens"]
    assert drafted(two_layers, prompts, PRECISE, **drafts) == (tokens, counts, [CODES, CODES, FULL])


def test_drafts_of_a_model(two_layers, prompts, precise):
    """The model drafts for itself, over codes of its own: every draft is accepted."""
    drafts = {"method": "draft_model", "model": two_layers, "attention_backend": "CUSTOM"}
    tokens, counts, layers = drafted(two_layers, prompts, PRECISE, **drafts)
    assert tokens == precise and layers == [CODES] * 4
    assert counts["accepted_tokens"] == counts["draft_tokens"] > 0


def test_drafts_found_in_the_text(two_layers, prompts, precise):
    drafts = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as other:
        tokens, counts, _ = other.submit(drafted, two_layers, prompts, None, **drafts).result()
    assert tokens == precise and 0 < counts["accepted_tokens"] < counts["draft_tokens"]
    assert drafted(two_layers, prompts, PRECISE, **drafts) == (tokens, counts, [CODES, CODES])
