import json

import pytest
from typer.testing import CliRunner

from tq_jax.commands import cli
from tq_jax.commands.doctor import command as doctor


def run(*arguments):
    return CliRunner().invoke(cli.build(["doctor"]), ["doctor", *arguments], catch_exceptions=False)


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """A machine without an NVIDIA GPU and without the driver's tools."""
    monkeypatch.setattr(doctor, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return tmp_path


@pytest.mark.parametrize("sign", ["device", "tool"])
def test_a_gpu_that_jax_does_not_see(sign, no_gpu, monkeypatch):
    assert doctor.unseen_gpu() is None
    file = no_gpu / {"device": "nvidia0", "tool": "nvidia-smi"}[sign]
    file.touch(0o755)
    result = run()
    assert "JAX sees no GPU: pip install 'jax[cuda13]'" in " ".join(result.output.split())
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor.unseen_gpu() == "unset JAX_PLATFORMS=cpu"
    monkeypatch.setattr(doctor.jax, "default_backend", lambda: "gpu")
    assert doctor.unseen_gpu() is None


def test_on_a_gpu_the_kernel_is_compared():
    check = {"error": 1e-4, "tolerance": doctor.TOLERANCE, "warnings": [], "ok": True}
    said = "Attention works: relative error 1.0e-04 to the reference (at most 0.001)"
    assert doctor._verdict(check, gpu=True) == said


def test_findings(no_gpu):
    result = run("--json", "-")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["backend"], found["gpu"]) == ("cpu", None)
    assert found["check"]["error"] == 0.0
    assert found["packages"]["matplotlib"]
    assert set(found["kernels"]) == {"decode", "prefill", "encode"}
    axes = {axis["axis"]: axis for axis in found["kernels"]["decode"]}
    assert set(axes) == set(doctor.AXES)
    assert "128" in axes["head dim"]["triton"]
    assert "head dims" in axes["head dim"]["reference"]["112"]
    for axis in axes.values():
        assert len(axis["triton"]) + len(axis["reference"]) == len(doctor.AXES[axis["axis"]])
    assert "No NVIDIA GPU: everything runs on the reference" in result.stderr
    assert "the reference runs. Without a GPU there is no kernel to compare it with" in result.stderr
    assert found["unseen_gpu"] is None


@pytest.mark.parametrize(
    ("version", "known", "said"),
    [
        ("3.7.1", True, "3.7.1 (torch on a GPU, tq-jax gate; the gate is known to hold for this version)"),
        ("3.9.0", False, "the gate is known to hold for 3.6.0 and 3.7.1, and newer versions to spill"),
        (None, None, "not installed (torch on a GPU, tq-jax gate)"),
    ],
)
def test_it_says_whether_the_gate_holds_for_the_installed_triton(version, known, said, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: version if name == "triton" else None)
    monkeypatch.setattr(doctor, "OPERATIONS", {})
    result = run("--json", "-")
    assert said in " ".join(result.stderr.split())
    found = json.loads(result.stdout)
    assert found["gate_known_to_hold"] is known
    assert {"triton", "faiss-cpu", "safetensors", "tokenizers"} <= set(found["packages"])


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_wrong_attention_fails(error, monkeypatch):
    bad = {"error": error, "tolerance": doctor.TOLERANCE, "warnings": [], "ok": error <= doctor.TOLERANCE}
    monkeypatch.setattr(doctor, "check_attention", lambda: bad)
    result = run()
    assert result.exit_code == 1
    assert "Attention FAILS" in result.stdout
