"""Every kernel lowers for CUDA without a GPU; three kinds of kernels compile, if the triton package is installed."""

import json
import sys
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import pytest
from refusals import refused
from typer.testing import CliRunner

from pallas_kernels.compat.compile import ARCHITECTURES, KNOWN_TO_HOLD, Compiled, compile_for, version_note
from pallas_kernels.compat.device import H100_MULTIPROCESSORS
from tq_jax.commands import cli
from tq_jax.commands.gate import xla
from tq_jax.commands.gate.cases import all_cases
from tq_jax.commands.gate.cases.prefill import DEVICES
from tq_jax.commands.gate.command import FAILURES_NAMED, make_row, make_table, summarize

CASES = {f"{op} {case.name}": (op, case) for op, case in all_cases()}


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_lowering(name):
    op, case = CASES[name]
    kernels = case.lower()
    assert {kernel.name for kernel in kernels} == set(case.only or (op,))
    assert set(case.expected) <= {kernel.name for kernel in kernels}
    assert all(kernel.ir and min(kernel.grid) > 0 for kernel in kernels)


@pytest.mark.slow
def test_names_are_unique_and_prefill_covers_all_devices():
    assert len(CASES) == len(list(all_cases()))
    assert sorted(name for names in DEVICES.values() for name in names) == sorted(ARCHITECTURES)
    assert set(CASES) >= xla.CASES >= set(xla.KNOWN_SPILLS)
    assert {name.split()[0] for name in xla.CASES} == {"append", "attend", "decode", "encode", "prefill"}


def test_known_spills_may_not_grow():
    for name, known in xla.KNOWN_SPILLS.items():
        assert xla.passes(name, [], known)
        assert not xla.passes(name, [], known + 4)
        assert not xla.passes(name, ["u8[2048,1024]"], 0)


def done(compiled: Compiled) -> Future:
    future = Future()
    future.set_result(compiled)
    return future


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "arch"), [("decode K4/V4", "sm_90"), ("decode K3/V3", "sm_80"), ("decode K2/V2", "sm_120")]
)
def test_compiling(name, arch):
    pytest.importorskip("triton")
    op, case = CASES[name]
    for kernel in case.lower():
        row = make_row(op, case, kernel, arch, done(compile_for(kernel, arch)))
        assert row["ok"], row
        assert row["spill_bytes"] == 0


def test_rows_say_what_is_wrong():
    op, case = CASES["decode K4/V4"]
    [kernel] = [kernel for kernel in case.lower() if kernel.name == op]
    good = Compiled(
        registers=255, stack_bytes=0, shared_bytes=1, instructions={"mma": 1, "prmt": 1, "async": 1}, sass=""
    )
    assert make_row(op, case, kernel, "sm_90", done(good))["ok"]
    spilling = Compiled(255, 8, 1, good.instructions, "")
    assert not make_row(op, case, kernel, "sm_90", done(spilling))["ok"]
    slow = make_row(op, case, kernel, "sm_90", done(Compiled(99, 0, 1, {"mma": 0, "prmt": 1, "async": 1}, "")))
    assert (slow["ok"], slow["missing"]) == (False, ["mma"])
    failed = Future()
    failed.set_exception(RuntimeError("no such instruction"))
    row = make_row(op, case, kernel, "sm_90", failed)
    assert (row["ok"], row["error"]) == (False, "RuntimeError('no such instruction')")


def test_the_last_line_names_what_fails():
    def row(kernel, arch, ok=False):
        return {"kernel": kernel, "arch": arch, "ok": ok}

    good = [row("encode V4", "sm_80", ok=True), row("encode V4", "sm_90", ok=True)]
    assert summarize(good, "compile as they should") == "2 of 2 compile as they should"
    bad = [row("attend dim 256: merge", "sm_90"), row("decode K3/V3", "sm_80"), row("decode K3/V3", "sm_120")]
    assert summarize(good + bad, "compile as they should") == (
        "2 of 5 compile as they should; these do not: attend dim 256: merge (sm_90); decode K3/V3 (sm_80, sm_120)"
    )
    many = [row(f"kernel {i}", "sm_90") for i in range(FAILURES_NAMED + 3)]
    said = summarize(many, "compile as they should")
    assert f"kernel {FAILURES_NAMED - 1} (sm_90)" in said and f"kernel {FAILURES_NAMED} " not in said
    assert said.endswith("; and 3 more kernels")


def test_versions_of_triton_that_the_gate_is_known_to_hold_for():
    assert all(version_note(version).endswith("for this version") for version in KNOWN_TO_HOLD)
    assert "newer versions to spill a few bytes" in version_note("3.8.0")


def run(*arguments):
    return CliRunner().invoke(cli.build(["gate"]), ["gate", *arguments])


def test_the_command_names_what_it_needs():
    result = run("--arch", "sm_90,sm_70")
    assert result.exit_code == 2
    assert "sm_70" in result.output


@pytest.mark.slow
def test_a_name_that_no_kernel_has_is_refused():
    pytest.importorskip("triton")
    said = refused("gate", "--only", "decoding")
    assert "expected a part of a label such as decode K1/V1; " in said
    assert "got 'decoding'" in said
    op, case = next((op, case) for op, case in CASES.values() if "sm_80" not in case.architectures)
    assert run("--only", f"{op} {case.name}", "--arch", "sm_80").exit_code == 2
    assert run("--arch", "").exit_code == 2


def test_the_package_is_needed_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert 'pip install -e ".[gate]" in a checkout of tq-jax' in refused("gate")


def test_xla_needs_its_wheels(monkeypatch):
    monkeypatch.setattr(xla, "toolkit", lambda: None)
    result = run("--xla")
    assert result.exit_code == 2
    assert "nothing compiled" in result.output and "jax-cuda13-pjrt" in result.output
    assert run("--xla", "--only", "decode").exit_code == run("--xla", "--full").exit_code == 2


def test_copies_are_a_fault():
    pool = jax.ShapeDtypeStruct((2048, 1024), jnp.uint8)
    hlo = "%copy = u8[2048,1024]{1,0:T(8)} copy(%p)\n%c = (u8[2048,1024]{1,0}) copy-start(%p)\n%b = f32[4]{0} copy(%q)"
    assert xla.copies_of(hlo, [pool, jax.ShapeDtypeStruct((4,), jnp.float32)]) == ["u8[2048,1024]"] * 2
    row = {"kernel": "k", "config": "", "arch": "sm_90a", "missing": [], "copies": ["u8[2048,1024]"], "ok": False}
    assert list(make_table([row]).columns[-1].cells) == ["copies u8[2048,1024]"]


@pytest.mark.slow
def test_the_command_compiles():
    pytest.importorskip("triton")
    result = run("--only", "K4/V4 dim 64", "--arch", "sm_90", "--json", "-")
    rows = json.loads(result.stdout)["rows"]
    assert rows and result.exit_code == 0
    assert {row["arch"] for row in rows} == {"sm_90"}
    assert all(row["ok"] for row in rows)
    assert f"Compiled by triton {sys.modules['triton'].__version__}: the gate is known to hold for" in result.stderr
    assert result.stderr.splitlines()[-1] == f"{len(rows)} of {len(rows)} compile as they should"


def test_the_device_of_whole_operations_is_described():
    """XLA compiles for a GPU that is absent by a description of it, which lies beside the command."""
    described = xla.TARGET.read_text("utf-8")
    assert described.startswith("gpu_device_info {") and f"core_count: {H100_MULTIPROCESSORS}" in described
