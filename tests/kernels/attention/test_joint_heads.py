"""Attention of a joint product, whose heads the first launch splits, against heads that are split before."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention.pipeline import fuses_heads
from pallas_kernels.layer import JointHeads
from tests.kernels.cases.joint import SHAPES, SPECS, check_parity
from tests.kernels.cases.whole_cache import filled_cache


@pytest.mark.sampled
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECS)
def test_parity_with_split_heads(name, shape):
    check_parity(name, shape)


def test_many_heads_are_split_before():
    shape = jax.ShapeDtypeStruct
    turn = (shape((1, 1, 64), jnp.float32),) * 2
    pages = filled_cache(SPECS["K4/V4"], (5,), group=4)[0].pages
    for parts, tokens, fused in ((6, 1, True), (6, 9, False), (200, 1, False)):
        joint = JointHeads(shape((1, tokens, 2, parts, 128), jnp.bfloat16), turn)
        assert fuses_heads(joint, pages) == fused
        assert not fuses_heads(joint, None)
