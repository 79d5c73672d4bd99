"""The small kernels of a decoder layer, interpreted, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.layer import JointHeads, NormWeights, residual_norm, split_heads

TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


norm, split = (jax.jit(function, static_argnames="implementation") for function in (residual_norm, split_heads))


def normal(seed: int, *shape: int, dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def close(got: jax.Array, want: jax.Array) -> None:
    assert got.dtype == want.dtype
    tolerance = TOLERANCE[got.dtype.name]
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("width", [48, 64])
def test_residual_norm(width, centered, dtype):
    hidden, added = (normal(i, 2, 3, width, dtype=dtype) for i in (0, 1))
    weights = NormWeights(normal(2, width, dtype=dtype), 1e-5, centered)
    for other in (added, None):
        want = norm(hidden, other, weights, implementation="reference")
        got = norm(hidden, other, weights, implementation="triton")
        np.testing.assert_array_equal(got[0], want[0])
        close(got[1], want[1])
    wide = (hidden + added).astype(jnp.float32)
    exact = wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    scale = weights.scale.astype(jnp.float32)[None, None]
    total = residual_norm(hidden, added, weights)[1].astype(jnp.float32)
    np.testing.assert_allclose(total, exact * (scale + float(centered)), rtol=0.03, atol=0.03)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norms", [None, False, True], ids=["plain", "norms", "centred norms"])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_split_heads(group, norms, dtype):
    dim = 24
    joint = normal(0, 2, 3, 2, group + 2, dim, dtype=dtype)
    angles = jax.random.normal(jax.random.key(1), (2, 3, dim // 2))
    options = {"turn": (jnp.cos(angles), jnp.sin(angles))}
    if norms is not None:
        scales = {name: normal(i, dim, dtype=dtype) for i, name in enumerate(("query_norm", "key_norm"), start=2)}
        options |= {name: NormWeights(scale, 1e-5, norms) for name, scale in scales.items()}
    want = split(joint, **options, implementation="reference")
    got = split(joint, **options, implementation="triton")
    jax.tree.map(close, got, want)
    np.testing.assert_array_equal(got.value, joint[..., -1, :])
    assert got.query.shape == (2, 3, 2 * group, dim)


def test_heads_are_turned_as_complex_numbers():
    """Channel i and channel i + d / 2 are the parts of a number that the angle turns; a query keeps its KV head."""
    joint = normal(0, 1, 2, 3, 4, 8, dtype="float32")
    angles = jax.random.normal(jax.random.key(1), (1, 2, 4))
    heads = split_heads(joint, (jnp.cos(angles), jnp.sin(angles)))
    number = lax.complex(joint[..., :4], joint[..., 4:])
    number = number * lax.complex(jnp.cos(angles), jnp.sin(angles))[:, :, None, None]
    want = jnp.concatenate([number.real, number.imag], axis=-1)
    np.testing.assert_allclose(heads.query.reshape(1, 2, 3, 2, 8), want[:, :, :, :2], atol=1e-5)
    np.testing.assert_allclose(heads.key, want[:, :, :, 2], atol=1e-5)


def test_limits():
    with pytest.raises(NotImplementedError, match="norms up to 16384 channels, got 20000"):
        residual_norm(jnp.ones((1, 20000)), None, NormWeights(jnp.ones(20000), 1e-5), implementation="triton")
    joint = jnp.ones((1, 1, 1, 130, 256))
    turn = (jnp.ones((1, 1, 128)),) * 2
    with pytest.raises(NotImplementedError, match="up to 16384 channels of a KV head, got 130 heads of 256"):
        split_heads(joint, turn, implementation="triton")


def test_joint_heads_split():
    joint = JointHeads(normal(0, 1, 2, 3, 5, 8, dtype="float32"), (jnp.ones((1, 2, 4)), jnp.zeros((1, 2, 4))))
    heads = joint.split()
    assert joint.query_shape == heads.query.shape == (1, 2, 9, 8)
    np.testing.assert_array_equal(heads.key, joint.product[..., -2, :])
