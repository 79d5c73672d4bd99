import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.compat.lowering import lower_for_cuda, triton_kernels


def copy_rows(rows, x, out, *, stored):
    row = rows[0]
    if stored:
        plt.store(out.at[row], plt.load(x.at[0]))
    else:
        plt.store(out.at[0], plt.load(x.at[row]))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("rows", "dtype", "wide"),
    [
        (2**25, jnp.uint8, False),
        (2**25 + 1, jnp.uint8, True),
        (2**26, jnp.uint8, True),
        (2**25, jnp.float16, False),
        (2**25 + 1, jnp.float16, True),
        (2**28, jnp.uint8, True),
    ],
)
def test_offsets_beyond_31_bits_have_64(rows, dtype, wide, stored):
    shape = jax.ShapeDtypeStruct
    large, small = shape((rows, 64), dtype), shape((1, 64), dtype)
    call = pl.pallas_call(
        functools.partial(copy_rows, stored=stored),
        out_shape=large if stored else small,
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        name="copy_rows",
    )
    [kernel] = triton_kernels(lower_for_cuda(call, shape((1,), jnp.int32), small if stored else large))
    assert ("xi64>" in kernel.ir) == wide
