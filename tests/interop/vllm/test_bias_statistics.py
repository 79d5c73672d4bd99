"""Models whose keys have a bias: centred by their weights, or refused."""

import types

import pytest

pytest.importorskip("vllm")

import jax.numpy as jnp
import numpy as np
import torch
from vllm_engines import greedy, layers_of, make_model, own_answers, running

import tq_jax as tq

BIAS = 40.0


class Projection(torch.nn.Linear):
    """As vLLM's, of 4 query and 2 KV heads."""

    num_heads, num_kv_heads, head_size, input_size, params_dtype = 4, 2, 16, 24, torch.float32

    def __init__(self, bias, *, pair=True):
        super().__init__(24, 8 * 16)
        self.pair = pair
        with torch.no_grad():
            self.bias.zero_()
            self.bias[4 * 16 : 6 * 16] = bias

    def forward(self, x):
        return (super().forward(x), None) if self.pair else super().forward(x)


class Rotary(torch.nn.Module):
    """Turns the sign at odd positions, and notes which there were."""

    def forward(self, positions, query, key):
        self.positions = positions
        return query, key * (1 - 2 * (positions % 2))[:, None]


@pytest.fixture
def find(monkeypatch):
    from interop.vllm import bias_statistics

    monkeypatch.setattr(bias_statistics, "QKVParallelLinear", Projection)
    monkeypatch.setattr(bias_statistics, "RotaryEmbeddingBase", Rotary)

    def find(*, config=None, **parts):
        owner = torch.nn.Module()
        for name, part in parts.items():
            owner.add_module(name, part)
        return bias_statistics.bias_statistics(owner, types.SimpleNamespace(**(config or {})), positions=1000)

    return find


def test_mean_and_weight_are_what_the_bias_does(find):
    mean, weight = find(qkv_proj=Projection(7.0))
    assert mean.shape == weight.shape == (2, 16) and float((mean - 7).abs().max()) < 0.2
    rotary, bias = Rotary(), torch.zeros(32)
    bias[3] = 7.0  # nearly cancels over positions, and makes a channel that turns with them
    mean, weight = find(qkv_proj=Projection(bias), rotary_emb=rotary, config={"rope_theta": 1e4})
    assert float(mean.abs().max()) < 2.5 and int(weight[0].argmin()) == 3
    assert int(rotary.positions.min()) == 0 and 900 < int(rotary.positions.max()) < 1000
    assert 20 < int(rotary.positions.median()) < 40


def test_projections_of_the_transformers_backend_return_no_pair(find):
    mean, _ = find(qkv_proj=Projection(7.0, pair=False))
    assert float((mean - 7).abs().max()) < 0.2
    assert find(qkv_proj=Projection(0.0, pair=False)) is None


def test_keys_without_a_bias_are_left_alone(find):
    assert find(qkv_proj=Projection(0.0)) is None
    assert find(other=torch.nn.Linear(2, 2), config={"model_type": "llama"}) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"config": {"model_type": "qwen2"}}, "a projection to queries, keys and values"),
        ({"config": {"attention_bias": True}}, "a projection to queries, keys and values"),
        ({"qkv_proj": Projection(1.0), "k_norm": torch.nn.Identity()}, "keys that are not normalized"),
        ({"qkv_proj": Projection(1.0), "config": {"rope_parameters": {}}}, "a rotary embedding"),
    ],
)
def test_a_bias_that_cannot_be_found_out_is_refused(find, given, expected):
    with pytest.raises(ValueError, match=f"expected {expected} .*got Module: .*`tq-jax calibrate MODEL`"):
        find(**given)


@pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # by vLLM
def test_qwen2_is_centred_by_its_weights(tmp_path, prompts):
    """The tokens of our own cache with the same statistics, which make keys as exact as without the bias."""
    model = make_model(tmp_path / "model", 2, "Qwen2", BIAS)
    prompts = prompts[1:2]
    with running(model, {"search": False}) as engine:
        found = greedy(engine, prompts)
        assert all(written > 0 for _, written, _, _ in layers_of(engine))
        said, statistics = _look(engine)
        mean, weight = (torch.stack(x).numpy() for x in zip(*statistics, strict=True))
    tq.save_statistics(mean, weight, tmp_path / "keys.safetensors")
    key, value = tq.QuantizerSpec(32, 4, scale="unbiased"), tq.QuantizerSpec(32, 4)
    assert found == own_answers(model, prompts, statistics=tmp_path / "keys.safetensors", key=key, value=value)
    assert "(36 instead of 256 bytes per head and token), keys centred and weighted by their bias" in said
    centred, plain = (key_error(model, prompts[0], key, x) for x in ((mean, weight), (0 * mean, 0 * weight + 1)))
    assert centred < 0.2 * plain


@pytest.mark.slow
@pytest.mark.families
@pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # by vLLM
def test_models_of_the_transformers_backend(tmp_path, prompts):
    """Olmo 2 has no implementation of vLLM's own; its keys have no bias."""
    model, prompts = make_model(tmp_path / "model", 2, "Olmo2"), prompts[1:2]
    key, value = tq.QuantizerSpec(32, 4, scale="unbiased"), tq.QuantizerSpec(32, 4)
    expected = own_answers(model, prompts, key=key, value=value)  # first, for vLLM changes the classes of transformers
    with running(model, {"search": False}) as engine:
        assert greedy(engine, prompts) == expected
        assert _look(engine)[1] == [None, None]


def _look(engine):
    """The message at the start, and the statistics of each layer."""
    from interop.vllm.report import summary

    def look(worker):
        layers = worker.vllm_config.compilation_config.static_forward_context
        return summary(worker.vllm_config), [layer.impl.statistics for layer in layers.values()]

    return engine.collective_rpc(look)[0]


def key_error(folder, ids, spec, statistics):
    """Largest norm of what quantizing loses of the keys of a prompt, over layers and heads."""
    import transformers

    from interop.hf.capture import capture

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with capture(model) as captured, torch.no_grad():
        model(torch.tensor([ids]))
    errors = []
    for layer, (mean, weight) in enumerate(zip(*statistics, strict=True)):
        keys, quantizer = captured.keys[layer][0].float().numpy(), tq.make_quantizer(spec)
        code = tq.quantize(quantizer, jnp.asarray((keys - mean) * weight))
        read = np.asarray(tq.dequantize(quantizer, code)) / weight + mean
        errors.append(np.linalg.norm(read - keys, axis=-1).mean())
    return max(errors)
