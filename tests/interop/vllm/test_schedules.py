"""Schedules and layers of other kinds, each in an engine of its own."""

import pytest

pytest.importorskip("vllm")

import numpy as np
from vllm_engines import NEW, PRECISE, PROMPTS, SAME, answers, greedy, layers_of, own_answers, running

import tq_jax as tq

pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # by vLLM

POOL = 1 << 22


def test_chunks_and_preemption(two_layers, prompts, precise):
    """Prompts in chunks of 16 tokens between the tokens of others; and memory for hardly more than two requests."""
    arguments = dict(max_model_len=96, max_num_batched_tokens=16, max_num_seqs=4, num_gpu_blocks_override=6)
    with running(two_layers, PRECISE, enable_prefix_caching=False, disable_log_stats=False, **arguments) as engine:
        assert [tokens[:SAME] for tokens in greedy(engine, prompts)] == precise
        preempted = [x.value for x in engine.get_metrics() if x.name == "vllm:num_preemptions"]
        assert preempted[0] > 0
        tokens = sum(PROMPTS) + len(PROMPTS) * (NEW - 1)
        assert all(written > tokens for _, written, _, _ in layers_of(engine))  # those of the preempted, twice


def test_prefix_hits_and_samples(two_layers, prompts, precise):
    """Three of the prompts have a whole block each, which the cache knows the second time."""
    with running(two_layers, PRECISE) as engine:
        assert [one[0] for one in answers(engine, prompts, max_tokens=SAME)[0]] == precise
        found, cached = answers(engine, prompts, max_tokens=SAME)
        assert [one[0] for one in found] == precise and cached == [32, 32, 0, 32]
        found, _ = answers(engine, prompts[:2], n=3, temperature=1e-3, seed=1, max_tokens=SAME)
        assert found == [[one] * 3 for one in precise[:2]]


@pytest.fixture(scope="module")
def statistics(four_layers, tmp_path_factory):
    """A file by the command, of a text of random words."""
    from interop.hf.calibrate import main

    folder = tmp_path_factory.mktemp("statistics")
    words = np.random.default_rng(2).integers(5, 199, 200)
    (folder / "text").write_text(" ".join(f"w{i}" for i in words))
    command = ["calibrate", four_layers, f"{folder}/keys.safetensors", "--text", f"{folder}/text", "--tokens", "200"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", command)
        main()
    return f"{folder}/keys.safetensors"


def test_boundary_layers_and_statistics(four_layers, statistics, prompts, said):
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
        "tq_jax compresses 2 of 4 layers [1, 2] to K3/V4 (32 instead of 256 bytes per head and token), keys centred "
        f"and weighted by {statistics}; layers [0, 3] stay in full precision (CPU_ATTN). "
        "Prompts attend within their chunks by torch; earlier tokens of theirs are dense meanwhile, in at most "
        "32.0 MiB. The same memory holds 1.78 times as many tokens"
    ) in said
