import json

import pytest
from typer.testing import CliRunner

from tq_jax.commands import cli
from tq_jax.commands.doctor import command as doctor


def run(*arguments):
    return CliRunner().invoke(cli.build(["doctor"]), ["doctor", *arguments], catch_exceptions=False)


def test_findings():
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
    assert "No NVIDIA GPU: everything runs as the reference" in result.stderr


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
