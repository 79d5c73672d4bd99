"""A small GGUF file, written by the package gguf, then broken in the ways that files break."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from tq_jax.models import RopeScaling, convert_gguf, load_model
from tq_jax.models.gguf_file import hf_tensors, read_gguf, split_rope_pairs

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 64, 4, 2, 16, 96
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", *ALPHABET, "he", "ll"]


def weights(*, tied: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), DIM), "output_norm": (DIM,)}
    if not tied:
        shapes["output"] = (len(TOKENS), DIM)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (DIM,),
            f"blk.{i}.attn_q": (HEADS * HEAD_DIM, DIM),
            f"blk.{i}.attn_k": (KV_HEADS * HEAD_DIM, DIM),
            f"blk.{i}.attn_v": (KV_HEADS * HEAD_DIM, DIM),
            f"blk.{i}.attn_output": (DIM, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm": (DIM,),
            f"blk.{i}.ffn_gate": (FFN, DIM),
            f"blk.{i}.ffn_up": (FFN, DIM),
            f"blk.{i}.ffn_down": (DIM, FFN),
        }
    return {f"{name}.weight": rng.standard_normal(shape, np.float32) / 8 for name, shape in shapes.items()}


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    pre: str = "smollm",
    extra: dict | None = None,
    raw: dict | None = None,
) -> Path:
    """A file of these tensors; those of `raw` are bytes of a type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, *[1] * (len(TOKENS) - 1)])
    writer.add_token_merges(["h e", "l l"])
    writer.add_eos_token_id(0)
    for name, value in (extra or {}).items():
        writer.add_uint32(name, value)
    for name, array in tensors.items():
        if name in (raw or {}):
            writer.add_tensor(name, raw[name][0], raw_dtype=raw[name][1])
        elif array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TQ_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def good(tmp_path) -> Path:
    return write(tmp_path / "good.gguf", weights())


def test_reads_what_was_written(good):
    file = read_gguf(good)
    found = hf_tensors(file)
    assert (file.config.head_dim, file.config.tied_head, file.config.stop_tokens) == (HEAD_DIM, True, (0,))
    gate = weights()["blk.1.ffn_gate.weight"]
    np.testing.assert_allclose(found["model.layers.1.mlp.gate_proj.weight"], gate, atol=np.abs(gate).max() / 100)
    query = split_rope_pairs(weights()["blk.0.attn_q.weight"], head_dim=HEAD_DIM)
    np.testing.assert_allclose(found["model.layers.0.self_attn.q_proj.weight"], query, atol=0.01)


def _finite(rng, kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random bytes of a type whose values are all finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, columns // block * size), np.uint8)
    with np.errstate(all="ignore"):
        broken = ~np.isfinite(gguf.quants.dequantize(data, kind)).all(1)
    data[broken] &= 0x3B  # no float of any width has all bits of its exponent set
    return data


@pytest.mark.parametrize("kind", sorted(gguf.quants._type_traits), ids=lambda kind: kind.name)
def test_every_type_that_the_package_gguf_dequantizes(tmp_path, monkeypatch, kind):
    for name, value in {"DIM": 256, "HEAD_DIM": 64}.items():
        monkeypatch.setitem(globals(), name, value)
    name, rng = "blk.1.ffn_up.weight", np.random.default_rng(0)
    data = _finite(rng, kind, FFN, 256)
    path = write(tmp_path / "x.gguf", weights(), raw={name: (data, kind)})
    found = hf_tensors(read_gguf(path))["model.layers.1.mlp.up_proj.weight"]
    assert (found.dtype, found.shape) == (np.float32, (FFN, 256))
    np.testing.assert_array_equal(found, gguf.quants.dequantize(data, kind))
    assert len(np.unique(found)) > 8


def test_q4_k_by_its_definition(tmp_path, monkeypatch):
    """A block of 256 values: d, dmin, eight scales and minima of six bits in twelve bytes, 128 bytes of four bits."""
    for name, value in {"DIM": 256, "HEAD_DIM": 64}.items():
        monkeypatch.setitem(globals(), name, value)
    rng = np.random.default_rng(0)
    scales, minima, codes = (
        rng.integers(0, 64, (FFN, 8)),
        rng.integers(0, 64, (FFN, 8)),
        rng.integers(0, 16, (FFN, 256)),
    )
    d, low = (rng.uniform(0.01, 0.1, (FFN, 1)).astype(np.float16) for _ in range(2))
    first = [scales[:, :4] | (scales[:, 4:] >> 4 << 6), minima[:, :4] | (minima[:, 4:] >> 4 << 6)]
    packed = np.concatenate([*first, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], axis=1)
    halves = codes.reshape(FFN, 4, 2, 32)  # 32 bytes hold 32 values in their lower bits and the next 32 in the others
    nibbles = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(FFN, 128)
    data = np.concatenate([d.view(np.uint8), low.view(np.uint8), packed, nibbles], axis=1).astype(np.uint8)
    name = "blk.0.ffn_gate.weight"
    path = write(tmp_path / "x.gguf", weights(), raw={name: (data, gguf.GGMLQuantizationType.Q4_K)})
    found = hf_tensors(read_gguf(path))["model.layers.0.mlp.gate_proj.weight"]
    wide = [np.repeat(x, 32, axis=1) for x in (scales, minima)]
    expected = d.astype(np.float32) * wide[0] * codes - low.astype(np.float32) * wide[1]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_other_types_are_refused_by_name(tmp_path, monkeypatch):
    kind = gguf.GGMLQuantizationType.I16
    path = write(tmp_path / "x.gguf", weights(), raw={"output_norm.weight": (np.ones(DIM, np.int16), kind)})
    with pytest.raises(NotImplementedError, match="output_norm.weight has type I16"):
        hf_tensors(read_gguf(path))


def test_rope_rows_are_the_inverse_of_the_converters_permutation():
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    permuted = (
        rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    )  # llama.cpp convert_hf_to_gguf, LlamaModel.permute
    np.testing.assert_array_equal(split_rope_pairs(permuted, head_dim=8), rows)


def test_converts_once_and_runs(good):
    directory = convert_gguf(good)
    stamp = (directory / "model.safetensors").stat().st_mtime_ns
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1, "the weights are as readable as the rest"
    model = load_model(good)
    assert (directory / "model.safetensors").stat().st_mtime_ns == stamp
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]
    assert model.tokenizer.decode(model.tokenizer.encode("hello 42<|end|>")) == "hello 42"
    assert model.tokenizer.encode("hello")[:2] == [TOKENS.index("he"), TOKENS.index("ll")]
    assert model.config.stop_tokens == (0,)


def test_an_untied_head_is_read(tmp_path):
    model = load_model(write(tmp_path / "untied.gguf", weights(tied=False)))
    assert not model.config.tied_head
    expected = weights(tied=False)["output.weight"]
    np.testing.assert_allclose(model.decoder.head.kernel[...], expected, atol=0.01)


@pytest.mark.parametrize("keep", [0, 3, 40, 700, 0.2, 0.5, 0.99, -1])
def test_truncated_files_are_refused(good, keep):
    data = good.read_bytes()
    size = int(keep * len(data)) if isinstance(keep, float) else keep
    good.write_bytes(data[:size])
    with pytest.raises(ValueError, match="expected a complete GGUF file, got a corrupt or truncated one"):
        read_gguf(good)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model" * 100)
    with pytest.raises(ValueError, match="GGUF magic invalid"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="no GGUF file at"):
        load_model(tmp_path / "absent.gguf")


def test_a_missing_tensor_is_named(tmp_path):
    tensors = weights()
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ValueError, match=r"expected 20 tensors, got none named blk.1.ffn_up.weight"):
        read_gguf(write(tmp_path / "x.gguf", tensors))


def test_an_unknown_tensor_is_refused(tmp_path):
    tensors = weights() | {"blk.0.attn_q.bias": np.zeros(HEADS * HEAD_DIM, np.float32)}
    with pytest.raises(NotImplementedError, match=r"'blk.0.attn_q.bias' is no part of the llama decoder"):
        read_gguf(write(tmp_path / "x.gguf", tensors))


def test_wrong_shapes_and_broken_numbers_are_refused(tmp_path):
    tensors = weights()
    wrong = tensors | {"blk.0.ffn_down.weight": tensors["blk.0.ffn_down.weight"][: DIM // 2]}
    with pytest.raises(ValueError, match=r"down_proj.weight: expected shape \(64, 96\), got \(32, 96\)"):
        load_model(write(tmp_path / "shape.gguf", wrong))
    tensors["output_norm.weight"][3] = np.nan
    with pytest.raises(ValueError, match="output_norm.weight: expected finite weights, got inf or nan"):
        convert_gguf(write(tmp_path / "nan.gguf", tensors))


def test_divisors_of_rotary_frequencies_are_a_scaling(tmp_path):
    """Files of Llama 3 store the divisors. Two of the wavelengths 2 pi 10000^(i/8) exceed 8192 / 4 tokens."""
    slow, between = 8.0, 1 / ((1 - (share := (8192 / (2 * np.pi * 1000) - 1) / 3)) / 8 + share)
    factors = np.array([1, 1, 1, 1, 1, 1, between, slow], np.float32)
    file = read_gguf(write(tmp_path / "x.gguf", weights() | {"rope_freqs.weight": factors}))
    assert file.config.rope_scaling == RopeScaling(kind="llama3", factor=8.0)
    assert not any("rope" in name for name in hf_tensors(file))
    factors[3] = 2
    with pytest.raises(NotImplementedError, match="'rope_freqs.weight' of 8 factors up to 8: supported is Llama 3's"):
        read_gguf(write(tmp_path / "y.gguf", weights() | {"rope_freqs.weight": factors}))


def test_unknown_options_and_tokenizers_are_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="llama.expert_group_count=4"):
        read_gguf(write(tmp_path / "experts.gguf", weights(), extra={"llama.expert_group_count": 4}))
    with pytest.raises(NotImplementedError, match="tokenizer.ggml.pre='tekken'"):
        convert_gguf(write(tmp_path / "pre.gguf", weights(), pre="tekken"))


def test_a_failed_conversion_leaves_nothing(tmp_path, good, monkeypatch):
    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    with pytest.raises(OSError, match="disk full"):
        convert_gguf(good)
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_experts_and_divisors_that_contradict_the_metadata_are_refused(tmp_path):
    tensors = {name: array for name, array in weights().items() if "ffn_" not in name or "norm" in name}
    for layer in range(LAYERS):
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = np.ones((4, DIM), np.float32)
        for name, shape in {"gate": (3, FFN, DIM), "up": (3, FFN, DIM), "down": (3, DIM, FFN)}.items():
            tensors[f"blk.{layer}.ffn_{name}_exps.weight"] = np.ones(shape, np.float32)
    fields = {"llama.expert_count": 4, "llama.expert_used_count": 2}
    file = read_gguf(write(tmp_path / "experts.gguf", tensors, extra=fields))
    with pytest.raises(ValueError, match=r"blk.0.ffn_gate_exps.weight: expected 4 experts, got \(3, 96, 64\)"):
        hf_tensors(file)
    one = weights() | {"rope_factors_long.weight": np.ones(8, np.float32)}
    with pytest.raises(
        ValueError, match=r"expected both tensors rope_factors_long.weight and rope_factors_short.weight"
    ):
        read_gguf(write(tmp_path / "one.gguf", one))
