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


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_wrong_attention_fails(error, monkeypatch):
    bad = {"error": error, "tolerance": doctor.TOLERANCE, "warnings": [], "ok": error <= doctor.TOLERANCE}
    monkeypatch.setattr(doctor, "check_attention", lambda: bad)
    result = run()
    assert result.exit_code == 1
    assert "Attention FAILS" in result.stdout
