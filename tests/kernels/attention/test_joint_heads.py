"""Attention of a joint product, whose heads the first launch splits, against heads that are split before."""

import pytest

from pallas_kernels.attention import LogitOptions
from pallas_kernels.attention.pipeline import fuses_heads
from tests.kernels.cases.joint import SHAPES, SPECS, check_parity, joint_case
from tq_jax.attention import attend_plan

FUSED = {"K4/V4", "K2.5/V3.5", "no statistics", "no slots"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECS)
def test_parity_with_split_heads(name, shape):
    check_parity(name, shape)


@pytest.mark.parametrize("name", SPECS)
def test_which_cases_save_a_launch(name):
    """Where decode has no room for tokens in full precision, the heads are split before."""
    joint, cache = joint_case(name, count=1, group=4, norms=False)
    plan = attend_plan(cache.spec, LogitOptions(0.1))
    assert fuses_heads(joint, cache.exact_keys.dtype, cache.pages, plan) == (name in FUSED)
