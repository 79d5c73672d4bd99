"""Quantized checkpoints: small files written here by the published definitions of their formats, and dequantized."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tq_jax.models import Decoder, DecoderConfig, config_from_hf, load_decoder
from tq_jax.models.checkpoint import open_tensors
from tq_jax.models.config_hf import config_to_hf
from tq_jax.models.dequantize import from_awq, from_fp8, from_gptq
from tq_jax.models.families import FAMILIES, tensor_names

CONFIG = DecoderConfig(
    vocab_size=40, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, tied_head=True
)
GROUP = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 12]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}


def with_strategy(strategy: str) -> dict:
    """A description of compressed tensors whose scales are of one kind."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    weights |= {"block_structure": [16, 12]} if strategy == "block" else {}
    return COMPRESSED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def shape_of(name: str) -> tuple[int, ...]:
    """The shape of a tensor of `CONFIG` in a checkpoint."""
    if "norm" in name:
        return (32,)
    return {
        "embed_tokens": (40, 32), "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32),
        "gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48),
    }[name.split(".")[-2]]  # fmt: skip


def pack(values: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Four bits of each eight columns in an integer; its i-th four bits are those of column `order[i]`."""
    columns = values.reshape(values.shape[0], -1, 8)
    packed = np.zeros(columns.shape[:2], np.uint32)
    for i, column in enumerate(order):
        packed |= columns[..., column].astype(np.uint32) << np.uint32(4 * i)
    return packed.view(np.int32)


def quantized(rng, method: str, shape: tuple[int, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a random projection, by the endings of their names, and its values by the definition."""
    outputs, inputs = shape
    if method in ("block", "tensor", "channel"):
        codes = np.asarray(jnp.asarray(rng.standard_normal(shape), jnp.float8_e4m3fn))
        sizes = {"block": (-(-outputs // 16), -(-inputs // 12)), "tensor": (1,), "channel": (outputs, 1)}
        scale = rng.uniform(0.5, 2.0, sizes[method]).astype(np.float32)
        wide = np.kron(scale, np.ones((16, 12), np.float32))[:outputs, :inputs] if method == "block" else scale
        return {"weight": codes, "scale": scale}, codes.astype(np.float32) * wide
    codes, groups = rng.integers(0, 16, (inputs, outputs)), inputs // GROUP
    zeros = rng.integers(0, 16, (groups, outputs))
    scales = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)
    index = np.arange(inputs) // GROUP
    if method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": pack(codes, order), "qzeros": pack(zeros, order), "scales": scales}
    else:
        if "desc_act" in method:
            index = rng.permutation(index)
        # The first format stores zero points less one, subtracted from whole integers.
        stored = pack(zeros).view(np.uint32) - np.uint32(0 if "v2" in method else 0x11111111)
        tensors = {"qweight": pack(codes.T).T.copy(), "qzeros": stored.view(np.int32), "scales": scales}
        if "without_index" not in method:
            tensors["g_idx"] = index.astype(np.int32)
    return tensors, ((codes - zeros[index]) * scales.astype(np.float32)[index]).T


def write(directory, method: str, description: dict, scale: str = "") -> dict[str, np.ndarray]:
    """A checkpoint whose projections are quantized; returns its tensors as they are to be read."""
    rng, stored, expected = np.random.default_rng(0), {}, {}
    for name in sorted(tensor_names(CONFIG, kind="hf")):
        if "_proj" in name:
            tensors, expected[name] = quantized(rng, method, shape_of(name))
            stem = name.removesuffix("weight")
            stored |= {stem + (scale if ending == "scale" else ending): array for ending, array in tensors.items()}
        else:
            stored[name] = expected[name] = rng.standard_normal(shape_of(name), np.float32)
    save_file(stored, directory / "model.safetensors")
    config = config_to_hf(CONFIG) | {"quantization_config": description}
    (directory / "config.json").write_text(json.dumps(config))
    return expected


def same_decoder(directory, expected: dict[str, np.ndarray]) -> None:
    """A directory loads as one whose weights are given as they are."""
    found = load_decoder(directory)
    plain = directory / "plain"
    plain.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in expected.items()}, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))
    other = load_decoder(plain)
    for name in ("qkv", "output"):
        kernels = [getattr(decoder.blocks[0].attention, name).kernel[...] for decoder in (found, other)]
        np.testing.assert_array_equal(*kernels)
    for name in ("gate_up", "down"):
        kernels = [getattr(decoder.blocks[0].mlp, name).kernel[...] for decoder in (found, other)]
        np.testing.assert_array_equal(*kernels)


@pytest.mark.parametrize(
    ("method", "description", "scale"),
    [
        ("block", FP8, "weight_scale_inv"),
        ("tensor", FP8 | {"weight_block_size": None}, "weight_scale_inv"),
        ("tensor", with_strategy("tensor"), "weight_scale"),
        ("channel", with_strategy("channel"), "weight_scale"),
        ("block", with_strategy("block"), "weight_scale"),
        ("awq", AWQ, ""),
        ("gptq", GPTQ, ""),
        ("gptq_without_index", GPTQ, ""),
        ("gptq_desc_act", GPTQ | {"desc_act": True}, ""),
        ("gptq_v2", GPTQ | {"checkpoint_format": "gptq_v2"}, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantized_checkpoints_load(tmp_path, method, description, scale):
    same_decoder(tmp_path, write(tmp_path, method, description, scale))


def add(directory, **arrays: np.ndarray) -> None:
    """Add tensors to the file of a checkpoint, or replace them; None takes one away."""
    with open_tensors(directory) as (types, read):
        stored = {name: read(name) for name in types} | arrays
    save_file({name: array for name, array in stored.items() if array is not None}, directory / "model.safetensors")


STEM = "model.layers.0.mlp.up_proj."


def test_scales_of_activations_and_biases_of_zeros_have_no_use(tmp_path):
    (tmp_path / "a").mkdir()
    expected = write(tmp_path / "a", "tensor", FP8 | {"activation_scheme": "static"}, "weight_scale_inv")
    add(tmp_path / "a", **{STEM + "input_scale": np.ones(1, np.float32)})
    same_decoder(tmp_path / "a", expected)
    (tmp_path / "b").mkdir()
    expected = write(tmp_path / "b", "gptq", GPTQ)
    add(tmp_path / "b", **{STEM + "bias": np.zeros(48, np.float16)})
    same_decoder(tmp_path / "b", expected)
    add(tmp_path / "b", **{STEM + "bias": np.ones(48, np.float16)})
    with pytest.raises(NotImplementedError, match=r"up_proj.bias' is no part of the llama decoder"):
        load_decoder(tmp_path / "b")


@pytest.mark.parametrize(
    ("method", "description", "change", "message"),
    [
        ("block", FP8, {"weight_scale_inv": None}, r"expected the tensor '.*up_proj.weight_scale_inv' beside"),
        ("block", FP8, {"weight_scale_inv": np.ones((2, 2), np.float32)}, r"up_proj.weight: expected one scale, 48 or"),
        ("awq", AWQ, {"scales": None}, r"expected the tensor '.*up_proj.scales' beside '.qweight', got none"),
        ("awq", AWQ, {"qzeros": np.ones((1, 6), np.int32)}, r"up_proj.weight: expected qzeros of shape \(2, 6\)"),
        ("gptq", GPTQ, {"scales": np.ones((2, 8), np.float16)}, r"up_proj.weight: expected scales of shape \(2, 48\)"),
        ("gptq", GPTQ, {"g_idx": np.full(32, 2, np.int32)}, r"up_proj.weight: expected g_idx from 0 to 1, got 2 to 2"),
    ],
)
def test_broken_checkpoints_are_refused(tmp_path, method, description, change, message):
    write(tmp_path, method, description, "weight_scale_inv")
    add(tmp_path, **{STEM + ending: array for ending, array in change.items()})
    with pytest.raises(ValueError, match=message):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method='bitsandbytes': supported is 'fp8' or 'compressed-tensors' or",
        ),
        ({}, "quant_method=None"),
        (FP8 | {"fmt": "e5m2"}, "fmt='e5m2': supported is 'e4m3'"),
        (COMPRESSED | {"format": "pack-quantized"}, "format='pack-quantized': supported is 'float-quantized'"),
        (COMPRESSED | {"quantization_status": "frozen"}, "quantization_status='frozen'"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme={'num_bits': 8}: supported is None"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config format='sparse-24"),
        (COMPRESSED, "weights strategy=None: supported is 'tensor' or 'channel' or 'block'"),
        (with_strategy("group"), "weights strategy='group'"),
        (AWQ | {"version": "gemv"}, "version='gemv': supported is 'gemm'"),
        (AWQ | {"bits": 8}, "quantization_config bits=8: supported is 4"),
        (AWQ | {"zero_point": False}, "zero_point=False: supported is True"),
        (GPTQ | {"bits": 3}, "quantization_config bits=3: supported is 4"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin': supported is 'gptq' or 'gptq_v2'"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype='int16'"),
        (GPTQ | {"dynamic": {"-:.*down": {}}}, "dynamic={'-:.*down': {}}: supported is None"),
    ],
)
def test_other_quantizations_are_refused_by_name(description, message):
    with pytest.raises(NotImplementedError, match=message):
        config_from_hf(config_to_hf(CONFIG) | {"quantization_config": description})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": [128]}, r"expected weight_block_size to be a list of two sizes, got \[128\]"),
        ({"group_size": 0}, "expected group_size to be -1 or a positive whole number, got 0"),
    ],
)
def test_fields_of_quantizations_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(config_to_hf(CONFIG) | {"quantization_config": FP8 | change})


def test_values_by_hand():
    """0x3C is 1.5 and 0xC8 is -4 in E4M3; AWQ's second four bits are the third output; GPTQ's zero points get one."""
    codes = np.array([[0x3C, 0xC8]], np.uint8).view(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(from_fp8(codes, np.float32([2.0]), block=None), [[3.0, -8.0]])
    ones = np.ones((1, 8), np.float16)
    qweight, zeros = np.array([[0x00000030]], np.int32), np.array([[0x00000010]], np.int32)
    np.testing.assert_array_equal(from_awq(qweight, zeros, ones, group=-1).ravel(), [0, 0, 2, 0, 0, 0, 0, 0])
    column = np.array([[0x00000050] + [0] * 7], np.int32)
    how = dict(g_idx=None, group=-1)
    found = from_gptq(column, np.array([[0x11111112]], np.int32), ones, zero_offset=1, **how)
    np.testing.assert_array_equal(found[0], [-3, 2, -3, -3, -3, -3, -3, -3])
    np.testing.assert_array_equal(found[1], [-2] * 8)


def test_fp8_as_transformers_reads_it():
    torch = pytest.importorskip("torch")
    found = pytest.importorskip("transformers.integrations.finegrained_fp8")
    rng = np.random.default_rng(1)
    weight = torch.tensor(rng.standard_normal((32, 24)), dtype=torch.float32).to(torch.float8_e4m3fn)
    scale = torch.tensor(rng.uniform(0.5, 2, (2, 2)), dtype=torch.float32)

    theirs = found.Fp8Dequantize(None)._dequantize_one(weight, scale)
    codes = weight.view(torch.uint8).numpy().view(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(from_fp8(codes, scale.numpy(), block=(16, 12)), theirs.numpy())


def test_experts_of_mxfp4_as_transformers_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    found = pytest.importorskip("transformers.integrations.mxfp4")
    config = dataclasses.replace(
        CONFIG, architecture="gpt_oss", num_experts=2, experts_per_token=1, dim=64, ffn_dim=32, tied_head=False,
        sliding_window=4, local_layers=(True, False),
    )  # fmt: skip
    rng, stored, blocks = np.random.default_rng(0), {}, {}
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    parameters = dict(nnx.to_flat_state(nnx.state(decoder)))
    for tensor in FAMILIES["gpt_oss"].stored(tied_head=False):
        path = tuple(tensor.path.split("."))
        leaf = parameters[("blocks", 0, *path) if tensor.per_layer else path]
        shape = tensor.stored_shape(np.empty(leaf.shape[1:] if tensor.per_layer else leaf.shape))
        for name in tensor.names("hf", config):
            if tensor.hf_layout == "inputs_first" and not name.endswith("bias"):
                experts, inputs, outputs = shape
                stored[name + "_blocks"] = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
                stored[name + "_scales"] = rng.integers(120, 130, (experts, outputs, inputs // 32), np.uint8)
                parts = (torch.tensor(stored[name + ending]) for ending in ("_blocks", "_scales"))
                blocks[name] = found.convert_moe_packed_tensors(*parts, dtype=torch.float32).numpy()
            else:
                stored[name] = rng.standard_normal(shape, np.float32)
    save_file(stored, tmp_path / "model.safetensors")
    described = config_to_hf(config) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    mlp = load_decoder(tmp_path).blocks[1].mlp
    name = "model.layers.1.mlp.experts."
    np.testing.assert_array_equal(mlp.down.kernel[0].swapaxes(1, 2), blocks[name + "down_proj"])
    np.testing.assert_array_equal(mlp.gate_up.kernel[0, :, 1].swapaxes(1, 2), blocks[name + "gate_up_proj"][..., 1::2])
