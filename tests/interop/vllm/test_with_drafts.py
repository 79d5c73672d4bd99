"""An engine with drafts. They import numba, after which another engine does not start properly in the same process: by
its name this file is the last of its folder."""

import pytest

pytest.importorskip("vllm")

from vllm_engines import PRECISE, SAME, greedy, running

pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # by vLLM


@pytest.mark.filterwarnings("ignore:\\nEncountered the use of a type that is scheduled for deprecation")  # by vLLM
def test_drafts(two_layers, prompts, precise):
    """Requests with up to three drafts each, found in their own text, which are verified over codes."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with running(two_layers, PRECISE, speculative_config=drafts, disable_log_stats=False) as engine:
        assert [tokens[:SAME] for tokens in greedy(engine, prompts)] == precise
        counts = {x.name: getattr(x, "value", None) for x in engine.get_metrics()}
        assert 0 < counts["vllm:spec_decode_num_accepted_tokens"] < counts["vllm:spec_decode_num_draft_tokens"]
