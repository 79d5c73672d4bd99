"""Where files of key statistics are found, and which of them are refused."""

import json
import os
import types
from pathlib import Path

import numpy as np
import pytest

import tq_jax as tq
from tq_jax import statistics_files
from tq_jax.statistics_files import (
    FILE_NAME,
    find_statistics,
    identify,
    key_traits,
    missing_statistics,
    read_statistics,
)

SHAPE = (3, 2, 16)


def config(**changes):
    given = dict(model_type="llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return types.SimpleNamespace(**(given | {"rope_theta": 10000} | changes))


def save(path, *, of=None, value=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    traits = None if of is None else key_traits(of)
    tq.save_statistics(np.full(SHAPE, float(value)), np.ones(SHAPE), path, model=traits)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TQ_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_folders_are_known_by_their_path(folder, cache):
    local = identify(folder, config())
    assert (local.name, local.revision, local.folder) == (str(folder), "", folder)
    assert local.places[0] == folder / FILE_NAME and local.places[1].parent == cache / "statistics"


def test_models_of_the_hub_are_known_by_name_and_commit(tmp_path, monkeypatch):
    """Whether they are asked for by name, as a user does, or by path, as vLLM does without a network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--some-model"
    for branch, commit in (("main", "12ab" * 10), ("other", "34cd" * 10)):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    model = identify("org/some-model", config())
    assert (model.name, model.revision, len(model.places)) == ("org/some-model", "12ab" * 10, 1)
    assert model == identify(repository / "snapshots" / ("12ab" * 10), config())
    assert model == identify("org/some-model", config(), revision="12ab" * 10)
    assert model.places[0].name.startswith("org--some-model-")
    assert model.command == f"tq-jax calibrate org/some-model --revision {'12ab' * 10}"
    others = [identify("org/some-model", config(), revision="other"), identify("org/x", config())]
    others.append(identify("org/some-model", config(num_hidden_layers=4)))
    assert others[0].revision == "34cd" * 10 and len({one.places[-1] for one in (model, *others)}) == 4
    unknown = identify("not/a/name/of/the/hub", config())
    assert (unknown.revision, unknown.command) == ("main", "tq-jax calibrate not/a/name/of/the/hub")


def test_both_forms_of_rotary_embedding_are_one():
    scaling = {"factor": 8, "low_freq_factor": 1.0}
    old = config(rope_theta=500000, rope_scaling=scaling | {"type": "llama3"})
    new = config(rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 5e5, "partial_rotary_factor": 1.0})
    assert key_traits(old) == key_traits(new)
    assert key_traits(old)["rope"] == {"factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 5e5, "rope_type": "llama3"}
    plain = config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert key_traits(config()) == key_traits(plain) != key_traits(old)
    layers = {"full_attention": {"rope_theta": 1}, "sliding_attention": {"rope_theta": 2, "rope_type": "default"}}
    assert key_traits(config(rope_parameters=layers))["rope"]["sliding_attention"] == {"rope_theta": 2.0}
    heads = types.SimpleNamespace(model_type="x", num_hidden_layers=1, num_attention_heads=4, hidden_size=64)
    assert (key_traits(heads)["kv_heads"], key_traits(heads)["head_dim"]) == (4, 16)
    nested = types.SimpleNamespace(get_text_config=lambda: config())
    assert key_traits(nested) == key_traits(config())


def test_precedence(folder, tmp_path):
    model = identify(folder, config())
    assert find_statistics(model) is None
    cached = save(model.places[1], of=config(), value=1)
    assert find_statistics(model) == cached
    beside = save(model.places[0], of=config(), value=2)
    assert find_statistics(model) == beside
    named = save(tmp_path / "named", value=3)
    assert find_statistics(model, str(named)) == named
    assert [read_statistics(path, model)[0].max() for path in (cached, beside, named)] == [1, 2, 3]
    with pytest.raises(FileNotFoundError, match="expected a file of key statistics, got nowhere: make .*calibrate /"):
        find_statistics(model, "nowhere")


def test_a_folder_that_cannot_be_written(folder, cache, monkeypatch):
    model = identify(folder, config())
    assert model.writable_place == folder / FILE_NAME and not cache.exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write into any folder
    assert model.writable_place == model.places[1] and model.places[1].parent.is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "with {'model_type': 'llama'}, got {'model_type': 'qwen2'}"),
        ({"num_hidden_layers": 2}, "with {'layers': 3}, got {'layers': 2}"),
        (
            {"num_key_value_heads": 4, "head_dim": 8},
            "{'head_dim': 16, 'kv_heads': 2}, got {'head_dim': 8, 'kv_heads': 4}",
        ),
        ({"rope_theta": 5e5}, "'rope': {'rope_theta': 10000.0}}, got {'rope': {'rope_theta': 500000.0}}"),
    ],
)
def test_files_of_other_models_are_refused(folder, changes, message):
    model = identify(folder, config())
    path = save(model.places[0], of=config(**changes))
    with pytest.raises(ValueError, match=f"{FILE_NAME}: expected statistics .*{message}.*: run `tq-jax calibrate /"):
        read_statistics(path, model)


def test_files_of_another_shape_and_damaged_ones_are_refused(folder):
    model = identify(folder, config(num_hidden_layers=5))
    path = save(model.places[0])
    with pytest.raises(ValueError, match=r"expected statistics .* of \(5, 2, 16\), got \(3, 2, 16\)"):
        read_statistics(path, model)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected contents of sha256 .*the file is damaged"):
        read_statistics(path, model)
    path.write_text("no statistics")
    with pytest.raises(ValueError, match="expected a safetensors file, got a damaged one"):
        read_statistics(path, model)


def test_a_file_can_be_read_by_others(folder):
    """A server often runs as another user."""
    before = os.umask(0o022)
    try:
        assert save(folder / FILE_NAME).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_the_cost_is_the_recorded_one(folder):
    said = missing_statistics(identify(folder, config()))
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "calibrated_cpu.json"
    rows = json.loads(path.read_text())["rows"]
    for window, caches in statistics_files.RECORDED.items():
        for label, figures in caches.items():
            for kind, figure in zip(("none", "file"), figures, strict=True):
                case = (window, label, kind)
                found = [r["kl_mean"] for r in rows if (r["window"], r["cache"], r["statistics"]) == case]
                assert len(found) == 3 and figure == pytest.approx(sum(found) / 3, rel=0.05)
            assert f"{label} {figures[0]:g} nats instead of {figures[1]:g}" in said
    assert str(folder / FILE_NAME) in said and said.endswith(f"tq-jax calibrate {folder}")
