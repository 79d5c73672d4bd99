"""Every kernel lowers for CUDA without a GPU; those of three kinds compile, where the triton package is installed."""

import json
from concurrent.futures import Future

import pytest
from typer.testing import CliRunner

from pallas_kernels.gate import Compiled, compile_for
from tq_jax import cli
from tq_jax.evaluate.gate import all_cases, make_row

CASES = {f"{op} {case.name}": (op, case) for op, case in all_cases()}


@pytest.mark.parametrize("name", CASES)
def test_lowering(name):
    op, case = CASES[name]
    kernels = case.lower()
    assert {kernel.name for kernel in kernels} == set(case.only or (op,))
    assert set(case.expected) <= {kernel.name for kernel in kernels}
    assert all(kernel.ir and min(kernel.grid) > 0 for kernel in kernels)


def done(compiled: Compiled) -> Future:
    future = Future()
    future.set_result(compiled)
    return future


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


def run(*arguments):
    return CliRunner().invoke(cli.build(["gate"]), ["gate", *arguments])


def test_the_command_names_what_it_needs():
    result = run("--arch", "sm_90,sm_70")
    assert result.exit_code == 2
    assert "sm_70" in result.output


@pytest.mark.slow
def test_the_command_compiles():
    pytest.importorskip("triton")
    result = run("--only", "K4/V4 dim 64", "--arch", "sm_90", "--json", "-")
    rows = json.loads(result.stdout)["rows"]
    assert rows and result.exit_code == 0
    assert {row["arch"] for row in rows} == {"sm_90"}
    assert all(row["ok"] for row in rows)
