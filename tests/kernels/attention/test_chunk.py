"""Exact attention of a chunk over itself: the kernel, interpreted, against the reference, and what cuDNN takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import LogitOptions
from pallas_kernels.attention.chunk import attend_chunk, attend_prompt
from pallas_kernels.compat import cudnn
from tests.kernels.cases.chunk import CASES, close, make_chunk

STATIC = ("options", "implementation")
ATTEND = [jax.jit(function, static_argnames=STATIC) for function in (attend_prompt, attend_chunk)]


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_kernel(name):
    arrays, options = make_chunk(CASES[name])
    for attend in ATTEND:
        want = attend(*arrays, options=options, implementation="reference")
        got = attend(*arrays, options=options, implementation="triton")
        close(got, want, arrays[0].dtype)
        again = attend(*arrays, options=options, implementation="triton")
        jax.tree.map(np.testing.assert_array_equal, got, again)


def test_both_give_the_same_outputs():
    arrays, options = make_chunk(CASES["float32, window, soft-cap"])
    found = attend_chunk(*arrays, options=options)
    np.testing.assert_allclose(
        found.acc / found.total[..., None], attend_prompt(*arrays, options=options), rtol=1e-5, atol=1e-6
    )


def test_what_each_takes(monkeypatch):
    query = jax.ShapeDtypeStruct((1, 16, 4, 128), jnp.bfloat16)
    assert cudnn.supports(query, softcap=None)
    assert not cudnn.supports(query, softcap=2.0)
    for shape, dtype in (((1, 16, 4, 128), "float32"), ((1, 16, 4, 264), "bfloat16"), ((1, 16, 4, 100), "bfloat16")):
        assert not cudnn.supports(jax.ShapeDtypeStruct(shape, dtype), softcap=None)
    wide = jnp.ones((1, 4, 2, 48))
    with pytest.raises(NotImplementedError, match=r"has head dims \(64, 80, 96, 128, 192, 256\), got 48"):
        attend_prompt(wide, wide, wide, options=LogitOptions(0.1), implementation="triton")
