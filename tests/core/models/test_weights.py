"""Hugging Face directories written here and by transformers, whole and broken."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tq_jax.models import Decoder, load_decoder
from tq_jax.models.config_hf import config_to_hf
from tq_jax.models.families import FAMILIES

TOKENS = jnp.array([[1, 5, 250, 9, 0, 33, 7, 7, 12]], jnp.int32)


def hf_arrays(decoder) -> dict[str, np.ndarray]:
    """A decoder's parameters under their Hugging Face names."""
    leaves = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(decoder))}
    family, out = FAMILIES["llama"], {}
    for tensor in (*family.tensors, family.head):
        path = tuple(tensor.path.split("."))
        if not tensor.per_layer:
            out |= {tensor.hf: leaves[path]} if path in leaves else {}
            continue
        for number, run in enumerate(decoder.runs):
            for layer, parameter in enumerate(leaves["blocks", number, *path]):
                [part] = tensor.views(parameter)
                out[tensor.hf.format(layer=run.first + layer)] = part.reshape(tensor.stored_shape(parameter))
    return out


@pytest.fixture
def directory(tiny, tmp_path):
    save_file(hf_arrays(tiny), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tiny.config)))
    return tmp_path


def test_round_trip(tiny, directory):
    loaded = load_decoder(directory)
    assert loaded.config == tiny.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(tiny))


def test_parts_go_to_the_devices_of_a_mesh(tiny, directory):
    loaded = load_decoder(directory, mesh=jax.make_mesh((2, 2), ("heads", "sequence")))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(tiny))
    kernel = loaded.blocks[0].attention.qkv.kernel[...]
    assert [part.data.shape[1] for part in kernel.addressable_shards] == [1] * 4
    with pytest.raises(NotImplementedError, match=r"sizes that divide num_kv_heads=2 are supported, got 4"):
        load_decoder(directory, mesh=jax.make_mesh((4,), ("heads",)))


def test_dtype_is_an_option(directory):
    loaded = load_decoder(directory, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}


def test_bfloat16_files(tiny, directory):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), hf_arrays(tiny))
    save_file({name: np.asarray(array) for name, array in half.items()}, directory / "model.safetensors")
    loaded = load_decoder(directory)
    np.testing.assert_array_equal(loaded.norm.scale[...], tiny.norm.scale[...].astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("keep", [0, 5, 600, 0.5, -1])
def test_truncated_safetensors_are_refused(directory, keep):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="expected safetensors, got a corrupt or truncated file"):
        load_decoder(directory)


def test_missing_and_unknown_tensors(tiny, directory):
    arrays = hf_arrays(tiny)
    del arrays["model.layers.2.mlp.up_proj.weight"]
    save_file(arrays, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"got none named model.layers.2.mlp.up_proj.weight"):
        load_decoder(directory)
    save_file(hf_arrays(tiny) | {"model.layers.0.self_attn.q_proj.bias": np.zeros(4)}, directory / "model.safetensors")
    with pytest.raises(NotImplementedError, match=r"q_proj.bias' is no part of the llama decoder"):
        load_decoder(directory)


def test_wrong_shape(tiny, directory):
    arrays = hf_arrays(tiny)
    arrays["model.norm.weight"] = np.ones(5, np.float32)
    save_file(arrays, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight: expected shape \(48,\), got \(5,\)"):
        load_decoder(directory)


def test_missing_and_broken_files(tiny, directory):
    (directory / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match="expected JSON, got a corrupt or truncated file"):
        load_decoder(directory)
    (directory / "config.json").write_text(json.dumps(config_to_hf(tiny.config) | {"vocab_size": "300"}))
    with pytest.raises(
        ValueError, match=r"config.json: expected vocab_size to be a positive whole number below 2\*\*31, got '300'"
    ):
        load_decoder(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json in"):
        load_decoder(directory)


def test_sharded_directories(tiny, directory):
    arrays = hf_arrays(tiny)
    names = sorted(arrays)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: arrays[name] for name in members}, directory / file)
    where = {name: file for file, members in shards.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_decoder(directory)), nnx.state(tiny))
    save_file({name: arrays[name] for name in names[3::2]}, directory / "b.safetensors")
    with pytest.raises(ValueError, match=r"expected b.safetensors to hold"):
        load_decoder(directory)
    for elsewhere in ("../b.safetensors", 3):
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where | {"x": elsewhere}}))
        with pytest.raises(ValueError, match=r"expected weight_map to be a table of file names"):
            load_decoder(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names b.safetensors, which is not in"):
        load_decoder(directory)


@pytest.mark.parametrize(
    "index",
    [{"weight_map": {"model.norm.weight": "old.safetensors"}}, {"weight_map": {"x": "lost.safetensors"}}, {}, "{"],
    ids=["old_shards", "lost_shards", "empty", "damaged"],
)
def test_a_single_file_counts_whatever_an_index_says(tiny, directory, index):
    save_file({"model.norm.weight": np.zeros(48, np.float32)}, directory / "old.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (directory / "model.safetensors.index.json").write_text(text)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_decoder(directory)), nnx.state(tiny))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(jnp.float8_e4m3fn, "F8_E4M3"), (jnp.float8_e5m2, "F8_E5M2"), (np.int8, "I8"), (np.int64, "I64"), (bool, "BOOL")],
)
def test_weights_without_their_scales_are_refused(tiny, directory, kind, name):
    arrays = hf_arrays(tiny)
    which = "model.layers.1.mlp.up_proj.weight"
    save_file(arrays | {which: np.asarray(arrays[which]).astype(kind)}, directory / "model.safetensors")
    with pytest.raises(NotImplementedError, match=f"{which} has type {name}: supported are F64, F32, F16, BF16"):
        load_decoder(directory)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1MB", "40KB"])
def test_directories_of_transformers(tiny, tmp_path, tied, shard):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(tiny.config, tied_head=tied, stop_tokens=(4, 7), rope_base=7e4)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_to_hf(config))).eval()
        oracle.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1MB")
    loaded = load_decoder(tmp_path)
    assert loaded.config == config
    with torch.no_grad():
        expected = oracle(torch.tensor(TOKENS.tolist())).logits.numpy()
    np.testing.assert_allclose(loaded.logits(loaded.forward(TOKENS)), expected, rtol=1e-4, atol=1e-5)


def test_an_untied_head_differs_from_the_embedding(tiny):
    tied = Decoder(dataclasses.replace(tiny.config, tied_head=True), rngs=nnx.Rngs(0))
    assert tied.head is None
    assert tiny.head is not None
