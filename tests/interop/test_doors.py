"""Former module paths, which warn and give the objects of the new ones, and the paths that other packages look up."""

import importlib
import subprocess
import sys
from importlib import metadata

import pytest

pytest.importorskip("torch")

DOORS = {
    "interop.dlpack": ("interop.torch.dlpack", ["to_jax", "to_torch"]),
    "interop.torch_cache": ("interop.torch.cache", ["TorchCache"]),
    "interop.hf_graph": ("interop.hf.decoding_graphs", ["decoding_graphs"]),
    "interop.capture": ("interop.hf.capture", ["Capture", "capture"]),
    "interop.calibrate": ("interop.hf.calibrate", ["calibrate", "main"]),
}


@pytest.mark.parametrize("old", DOORS)
def test_a_former_path_warns_and_gives_the_same_objects(old, monkeypatch):
    new, names = DOORS[old]
    if new.startswith("interop.hf"):
        pytest.importorskip("transformers")
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} has moved to {new}$"):
        door = importlib.import_module(old)
    home = importlib.import_module(new)
    assert [getattr(door, name) is getattr(home, name) for name in names] == [True] * len(names)


@pytest.mark.slow
def test_calibration_runs_from_both_paths():
    """The help text names the path that was run."""
    pytest.importorskip("transformers")
    said = []
    for module in ("interop.hf.calibrate", "interop.calibrate"):
        command = [sys.executable, "-m", module, "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.startswith(f"usage: python -m {module} [-h]")
        said.append(" ".join(result.stdout.replace(module, "MODULE").split()))
    assert said[0] == said[1]


def test_names_of_the_transformers_cache():
    pytest.importorskip("transformers")
    hf = importlib.import_module("interop.hf")
    homes = {
        "ATTENTION": "handle",
        "CACHE_ARGUMENT": "layer",
        "CompressedLayer": "layer",
        "TurboQuantCache": "cache",
    }
    assert sorted(homes) == sorted(hf.__all__)
    for name, home in homes.items():
        assert getattr(hf, name) is getattr(importlib.import_module(f"interop.hf.{home}"), name)
    with pytest.raises(AttributeError, match=r"module 'interop.hf' has no attribute 'DynamicCache'"):
        hf.DynamicCache  # noqa: B018


@pytest.mark.parametrize(
    "path",
    [
        "interop.hf.command:hf",
        "interop.hf.calibrate_command:calibrate",
        "interop.vllm.serve_bench.command:serve_bench",
        "interop.vllm.plugin:register",
        "interop.vllm.plugin:platform",
    ],
)
def test_entry_points_resolve(path):
    assert callable(metadata.EntryPoint("name", path, "group").load())


def test_entry_points_import_no_framework():
    """`tq-jax` lists the command without torch and transformers, and vLLM loads the plugin without JAX."""
    code = "import sys, {}; assert not {{{}}} & set(sys.modules)"
    for module, absent in {
        "interop.hf.command": "'torch', 'transformers'",
        "interop.hf.calibrate_command": "'torch', 'transformers'",
        "interop.vllm.serve_bench.command": "'torch', 'vllm'",
        "interop.vllm.plugin": "'jax', 'torch', 'vllm'",
        "interop.vllm.options": "'jax', 'torch', 'vllm'",
    }.items():
        subprocess.run([sys.executable, "-c", code.format(module, absent)], check=True)
