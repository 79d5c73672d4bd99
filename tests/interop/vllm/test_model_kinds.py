"""Models whose layers are not all alike, by vLLM: at K8/V8 the tokens of vLLM's own attention."""

import pytest

pytest.importorskip("vllm")

import torch
from vllm_engines import PRECISE, SAME, VOCABULARY, clear, greedy, layers_of, running, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),  # by vLLM
]

WINDOW = 32
GAP = 0.3
"""Nats between the two likeliest tokens which roundings in bfloat16, to a sixteenth, do not turn round."""
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, initializer_range=0.08, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MIXED = dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=WINDOW, num_hidden_layers=4)
# All experts take part: the choice of some flips at rounding errors.
EXPERTS = dict(num_experts=4, num_experts_per_tok=4, moe_intermediate_size=32)
SHORT_CONVOLUTION = dict(
    num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, full_attn_idxs=[1, 3], conv_dim=128,
    conv_dim_out=128, conv_L_cache=3, block_dim=128, block_ff_dim=96, block_auto_adjust_ff_dim=False,
)  # fmt: skip
LINEAR = dict(
    num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=128, linear_value_head_dim=128, head_dim=32,
    shared_expert_intermediate_size=32, **EXPERTS,
)  # fmt: skip
KINDS = {
    "Lfm2": SHORT_CONVOLUTION,
    "Qwen3Next": LINEAR,
    "Gemma3": MIXED | dict(head_dim=32, query_pre_attn_scalar=32),
    "GptOss": MIXED | dict(head_dim=32, num_local_experts=4, num_experts_per_tok=4),
    "Qwen3Moe": EXPERTS | dict(head_dim=32, num_hidden_layers=2),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def model_of(folder, kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(**SIZES | KINDS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    if kind != "Lfm2":  # the logits of which are apart
        with torch.no_grad():
            model.lm_head.weight.mul_(4)
    return save_model(folder, model)


def compare(folder, prompts, options=PRECISE, *, gap=None, **arguments):
    """Tokens by vLLM's own attention, up to the first that is less clear than a gap, and by ours, and our layers."""
    arguments = dict(kv_cache_memory_bytes=1 << 24, block_size=None) | arguments
    with running(folder, None, **arguments) as engine:
        want = greedy(engine, prompts) if gap is None else clear(engine, prompts, gap)
        blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
    with running(folder, options, **arguments) as engine:
        found, cache = greedy(engine, prompts), engine.llm_engine.vllm_config.cache_config
        return want, found, layers_of(engine), cache.num_gpu_blocks / blocks


def kinds_of(layers):
    return [name for name, *_ in layers]


@pytest.mark.parametrize(
    ("kind", "dtype"), [pytest.param("Lfm2", "float32", marks=pytest.mark.families), ("Qwen3Next", "bfloat16")]
)
def test_layers_with_states(kind, dtype, tmp_path, prompts, said):
    """Short convolutions and linear attention: blocks hold states in one layer and pages in the next."""
    gap = GAP if dtype == "bfloat16" else None
    want, found, layers, more = compare(model_of(tmp_path, kind), prompts, dtype=dtype, gap=gap)
    assert kinds_of(layers) == ["TurboQuantImpl"] * 2 and all(written for _, written, *_ in layers)
    assert sum(map(len, want)) >= 10
    assert [tokens[: len(same)] for tokens, same in zip(found, want, strict=True)] == want
    assert more > 1.05
    assert "compresses 2 of 2 layers [1, 3]" in said[0] and "layers [0, 2] have a state instead" in said[0]


@pytest.mark.parametrize("kind", [pytest.param("Gemma3", marks=pytest.mark.families), "GptOss"])
def test_layers_with_windows_stay_as_they_are(kind, tmp_path, prompts, said):
    folder = model_of(tmp_path, kind)
    want, found, layers, _ = compare(folder, prompts)
    assert kinds_of(layers) == ["CPUAttentionBackendImpl", "TurboQuantImpl"] * 2
    assert found == want
    assert "compresses 2 of 4 layers [1, 3]" in said[0] and "layers [0, 2] stay in full precision (CPU_ATTN)" in said[0]
    with running(folder, PRECISE | {"skip_sliding_window": False}, block_size=None) as engine:
        assert [tokens[:SAME] for tokens in greedy(engine, prompts)] == [tokens[:SAME] for tokens in want]
        assert kinds_of(layers_of(engine)) == ["TurboQuantImpl"] * 4


@pytest.mark.families
def test_experts(tmp_path, prompts):
    want, found, layers, more = compare(model_of(tmp_path, "Qwen3Moe"), prompts)
    assert kinds_of(layers) == ["TurboQuantImpl"] * 2 and more > 3
    assert found == want


def test_blocks_of_all_layers_side_by_side(two_layers, prompts, expected, monkeypatch):
    """The layout in which a block holds the pages of all layers."""
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")
    with running(two_layers, {}) as engine:
        assert engine.llm_engine.vllm_config.cache_config.kv_cache_layout == "BLHNC"
        assert greedy(engine, prompts) == expected


def test_a_connector_moves_blocks(two_layers, prompts, expected, tmp_path):
    """One engine stores its blocks as files, another reads them instead of computing them."""
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="ExampleConnector", kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(tmp_path)},
    )  # fmt: skip
    written = []
    for _ in range(2):
        with running(two_layers, {}, kv_transfer_config=transfer) as engine:
            assert greedy(engine, prompts[:1])[0] == expected[0]
            written.append(layers_of(engine)[0][1])
    assert list(tmp_path.rglob("*.safetensors"))
    assert written[1] <= written[0] - 32  # a block of the prompt came from files
