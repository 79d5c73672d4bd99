"""Every kernel lowers for CUDA without a GPU; those of three kinds compile, where the triton package is installed."""

import pytest

from pallas_kernels.decode.triton import stages_for
from pallas_kernels.gate import compile_for
from tq_jax.evaluate.gate import Kernel, kernels, lower, make_row

KERNELS = {kernel.name: kernel for kernel in kernels()}


@pytest.mark.parametrize("name", KERNELS)
def test_lowering(name):
    kernel: Kernel = KERNELS[name]
    lowered = lower(kernel)
    assert lowered.name == "decode"
    assert lowered.grid[1:] == (2, 2)
    stages = stages_for(kernel.key.format, kernel.config)
    assert (lowered.num_warps, lowered.num_stages) == (kernel.config.num_warps, stages)
    assert "tt.dot" in lowered.ir


@pytest.mark.parametrize(("name", "arch"), [("K4/V4", "sm_90"), ("K3/V3", "sm_80"), ("K2/V2", "sm_120")])
def test_compiling(name, arch):
    pytest.importorskip("triton")
    row = make_row(KERNELS[name], arch, compile_for(lower(KERNELS[name]), arch))
    assert row["ok"], row
    assert row["spill_bytes"] == 0
