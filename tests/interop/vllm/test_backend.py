"""The backend without an engine: what it honours, and what it refuses."""

import dataclasses
import types

import pytest

pytest.importorskip("vllm")

import torch

import tq_jax as tq
from interop.torch.cache import TorchCache
from interop.torch.paged_rows import PagedRows
from interop.vllm.calls import RowBuffers, UniformCall, split_runs

D, PAGE = 32, 32
OURS = {"tq_jax": {"search": False, "window": 0, "sinks": 0}}


@pytest.fixture(scope="module")
def config():
    from vllm.config import AttentionConfig, VllmConfig

    return VllmConfig(attention_config=AttentionConfig(backend="CUSTOM"), additional_config=OURS)


@pytest.fixture
def make_impl(config):
    from vllm.config import set_current_vllm_config

    from interop.vllm.backend import TurboQuantImpl

    def make(**options):
        with set_current_vllm_config(config):
            return TurboQuantImpl(4, D, D**-0.5, 2, **options)

    return make


@pytest.mark.parametrize(
    "given",
    [
        {"alibi_slopes": [1.0]},
        {"kv_sharing_target_layer_name": "model.layers.0"},
        {"kv_cache_dtype": "fp8"},
        {"attn_type": "encoder_decoder"},
        {"use_alibi_sqrt": True},
        {"something_new": 1},
    ],
)
def test_arguments_that_mean_something_are_refused(make_impl, given):
    with pytest.raises(NotImplementedError, match=f"does not know {next(iter(given))}="):
        make_impl(**given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_windows_caps_and_sinks_are_honoured(make_impl, dtype):
    """One sequence of 70 tokens in three blocks, the last 8 of which are queries: as our own cache attends."""
    from interop.vllm.metadata import TurboQuantMetadata

    random = torch.Generator().manual_seed(0)
    sinks = torch.nn.Parameter(torch.randn(4, generator=random).to(dtype))  # of gpt-oss: a parameter with a gradient
    impl = make_impl(sliding_window=40, logits_soft_cap=2.0, sinks=sinks, something_new=None)
    impl.layer_index = 0
    memory = torch.zeros(5, 2, PAGE, 36, dtype=torch.uint8)
    k, v = torch.randn(2, 70, 2, D, generator=random)
    table = torch.tensor([[4, 2, 1]], dtype=torch.int32)
    position = torch.arange(70)
    impl.do_kv_cache_update(None, k, v, torch.zeros(0), position)  # while memory is measured
    impl.do_kv_cache_update(None, k, v, memory, table[0, position // PAGE].long() * PAGE + position % PAGE)
    query, output = torch.randn(8, 4, D, generator=random), torch.full((8, 4, D), torch.nan)
    assert not impl.forward(None, query, k, v, memory, None, output.clone()).any()
    [run], _ = split_runs([0, 8], 8)
    rows = RowBuffers(1).rows(run, PagedRows(table, torch.tensor([70], dtype=torch.int32)))
    metadata = TurboQuantMetadata((UniformCall(run, rows),), (), position, 70)
    impl.forward(None, query, k, v, memory, metadata, output)
    quantizers = tq.QuantizerSpec(D, 4, scale="unbiased"), tq.QuantizerSpec(D, 4)
    spec = tq.CacheSpec(
        2, D, 96, *quantizers, window=0, sink_tokens=0, center_keys=False, smooth_keys=False, dtype="float32"
    )
    cache = TorchCache(spec, 1)
    cache.append(k[None], v[None])
    given = dict(sliding_window=40, softcap=2.0, sink_logits=sinks.detach().float())
    torch.testing.assert_close(output, cache.attend(query[None], **given)[0], rtol=0, atol=1e-6)
    with pytest.raises(NotImplementedError, match="outputs are not quantized"):
        impl.forward(None, query, k, v, memory, metadata, output, output_scale=torch.ones(1))


def test_backends_derived_for_other_attention_are_refused(config):
    """Chunked attention of Llama 4, prefixes that see all of themselves, fast prefill: by builders of their own."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend
    from vllm.model_executor.layers.attention.encoder_only_attention import create_encoder_only_attention_backend
    from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend

    from interop.vllm.backend import TurboQuantBackend, for_options
    from interop.vllm.options import Options

    of_a_layer = for_options(Options())
    with set_current_vllm_config(config):
        for derive in (
            lambda: create_chunked_local_attention_backend(TurboQuantBackend, 64),
            lambda: create_encoder_only_attention_backend(TurboQuantBackend),
            lambda: create_fast_prefill_custom_backend("FastPrefill", of_a_layer),
        ):
            with pytest.raises(NotImplementedError, match="not plainly causal .* are not compressed, got .*: serve it"):
                derive()


def test_blocks_lie_at_any_distance(make_impl):
    """The same tokens in blocks without gaps and in blocks with another layer's between them are the same bytes."""
    random = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 70, 2, D, generator=random)
    dense, both = torch.zeros(5, 2, PAGE, 36, dtype=torch.uint8), torch.zeros(5, 2, 2, PAGE, 36, dtype=torch.uint8)
    for memory in (dense, both[:, 1]):
        make_impl().do_kv_cache_update(None, k, v, memory, torch.arange(30, 100))
    assert bool(dense.any()) and torch.equal(both[:, 1], dense) and not both[:, 0].any()


def test_a_copied_block_is_a_copied_page(make_impl):
    """A block copied as bytes to another place attends like the first; a zeroed one holds zeros."""
    from interop.torch.paged import PagedRows

    random = torch.Generator().manual_seed(0)
    impl, memory = make_impl(), torch.full((6, 2, PAGE, 36), 255, dtype=torch.uint8)
    k, v = torch.randn(2, 2 * PAGE, 2, D, generator=random)
    impl.do_kv_cache_update(None, k, v, memory, torch.arange(2 * PAGE))
    host = memory[:2].clone()  # as offloading keeps it
    memory[4], memory[3] = host[0], host[1]
    memory[:2].zero_()
    query, lengths = torch.randn(1, 1, 4, D, generator=random), torch.tensor([2 * PAGE], dtype=torch.int32)
    moved, zeroed = (
        impl._pool.attend(query, PagedRows(torch.tensor([table], dtype=torch.int32), lengths))
        for table in ([4, 3], [0, 1])
    )
    assert not zeroed.any()
    memory[:2] = host
    back = impl._pool.attend(query, PagedRows(torch.tensor([[0, 1]], dtype=torch.int32), lengths))
    assert bool(moved.any()) and torch.equal(moved, back)


def test_what_selection_refuses():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from interop.vllm.platform import TurboQuantCpuPlatform
    from interop.vllm.plugin import register

    register()
    fits = AttentionSelectorConfig(64, torch.bfloat16, "auto", 32, has_sink=True, has_sliding_window=True)
    select = TurboQuantCpuPlatform.get_attn_backend_cls
    assert select(AttentionBackendEnum.CUSTOM, fits).endswith("TurboQuantBackend")
    assert not select(AttentionBackendEnum.CPU_ATTN, fits).endswith("TurboQuantBackend")
    for change, reason in (
        ({"use_mla": True}, "MLA not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"head_size": 576}, "head_size not supported"),
        ({"block_size": 16}, "block_size not supported"),
        ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_dcp": True}, "DCP not supported"),
    ):
        with pytest.raises(ValueError, match=f"does not fit this model: .*{reason}"):
            select(AttentionBackendEnum.CUSTOM, fits._replace(**change))


def test_options_are_checked_at_once():
    from vllm.config import AttentionConfig, VllmConfig

    with pytest.raises(ValueError, match="got \\['bits'\\]"):
        VllmConfig(attention_config=AttentionConfig(backend="CUSTOM"), additional_config={"tq_jax": {"bits": 4}})
    with pytest.raises(ValueError, match="expected --attention-backend CUSTOM with tq_jax options, got None"):
        VllmConfig(additional_config=OURS)


def test_options_that_no_layer_reads_are_refused(tmp_path):
    from transformers import MambaConfig
    from vllm.config import AttentionConfig, ModelConfig, VllmConfig

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, architectures=["MambaForCausalLM"])
    config.save_pretrained(tmp_path)
    model = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    given = dict(model_config=model, attention_config=AttentionConfig(backend="CUSTOM"))
    with pytest.raises(ValueError, match=r"a model with attention with tq_jax options, got \['MambaForCausalLM'\]"):
        VllmConfig(**given, additional_config=OURS)


def test_bytes_of_a_token():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from interop.vllm.backend import for_options
    from interop.vllm.options import Options

    backend = for_options(Options(key_bits=3))
    plain = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    spec = backend.customize_spec(plain)
    assert spec.page_size_bytes == 2 * 32 * (24 + 2 + 32 + 2) and spec.dtype == plain.dtype
    assert backend.customize_spec(spec) == spec and backend is for_options(Options(key_bits=3))
    with pytest.raises(NotImplementedError, match="one size are compressed, got 64 and 32"):
        backend.customize_spec(dataclasses.replace(plain, head_size_v=32))


def test_what_the_builder_refuses(monkeypatch):
    from interop.vllm import metadata

    monkeypatch.setattr(metadata, "report", lambda config: None)

    def build(spec_bytes=36):
        config = types.SimpleNamespace(
            model_config=None, cache_config=None, additional_config={}, speculative_config=None,
            parallel_config=types.SimpleNamespace(decode_context_parallel_size=1),
            scheduler_config=types.SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64),
        )  # fmt: skip
        sizes = {"block_size": 32, "head_size": D, "num_kv_heads": 2, "dtype": torch.float32}
        spec = types.SimpleNamespace(state_content_bytes=spec_bytes, **sizes)
        return metadata.TurboQuantBuilder(spec, ["layer"], config, torch.device("cpu"))

    with pytest.raises(RuntimeError, match="does not say how many bytes"):
        build(spec_bytes=None)
    with pytest.raises(NotImplementedError, match="causal=False"):
        build().build(0, types.SimpleNamespace(causal=False))


def test_statistics_that_do_not_fit(monkeypatch):
    import numpy as np
    from vllm import distributed

    from interop.vllm.backend import layer_statistics

    arrays = np.arange(2 * 4 * 8, dtype=np.float32).reshape(2, 4, 8)
    monkeypatch.setattr(distributed, "get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: 2)
    mean, weight = layer_statistics((arrays, arrays + 1), 1, 2, 8)
    assert mean.tolist() == arrays[1, 2:].tolist() and torch.equal(weight, mean + 1)
    for wrong in ((2, 2, 8), (0, 5, 8), (0, 2, 16)):
        with pytest.raises(ValueError, match="expected statistics of more than .* got \\(2, 4, 8\\)"):
            layer_statistics((arrays, arrays + 1), *wrong)


def test_plugins(monkeypatch, said):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from interop.vllm import plugin

    custom = AttentionBackendEnum.CUSTOM
    assert plugin.platform() == plugin.PLATFORM
    plugin.register()
    plugin.register()
    assert custom.get_path() == plugin.BACKEND
    register_backend(custom, "another.Backend")
    plugin.register()
    assert custom.get_path() == "another.Backend" and "CUSTOM is another.Backend already" in " ".join(said)
    custom.clear_override()
    monkeypatch.setattr(plugin, "PLATFORM", "another.platform.Platform")
    plugin.register()
    assert custom.get_path() == plugin.BACKEND and "ignores --attention-backend CUSTOM" in " ".join(said)
