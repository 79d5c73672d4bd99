"""Attention over a cache has derivatives along a direction; a gradient is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import make_spec, tokens

import tq_jax as tq

SINKS = jnp.asarray([0.5, -1.0, 0.0, 2.0])


@pytest.fixture(scope="module")
def cache():
    k, v, q = tokens(2, 90)
    return tq.append(tq.init_cache(make_spec(), batch=2), k, v, query=q)


def attended(cache, chunk):
    """Attention of one token as a function of its query, and of its key and value if there is a chunk."""
    k, v, q = tokens(2, 1, seed=3)

    def attend(query, key, value):
        given = (key, value) if chunk else None
        return tq.attend(query, cache, chunk=given, sink_logits=SINKS, implementation="reference")

    return attend, (q, k, v)


@pytest.mark.parametrize("chunk", [False, True])
def test_derivatives_along_a_direction(cache, chunk):
    attend, given = attended(cache, chunk)
    step = jax.tree.map(lambda x: 1e-2 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), given)
    _, along = jax.jvp(attend, given, step)
    ahead, behind = (attend(*jax.tree.map(lambda x, y, s=sign: x + s * y, given, step)) for sign in (1, -1))
    np.testing.assert_allclose(along, (ahead - behind) / 2, rtol=1e-2, atol=1e-5)
    assert jax.jacfwd(attend)(*given).shape == (*given[0].shape, *given[0].shape)


@pytest.mark.parametrize(("chunk", "argument"), [(False, 0), (True, 0), (True, 1)])
def test_a_gradient_is_refused_by_name(cache, chunk, argument):
    attend, given = attended(cache, chunk)
    for wrapped in (attend, jax.jit(attend), jax.checkpoint(attend)):
        with pytest.raises(NotImplementedError, match=r"attend: derivatives .* are supported, got a gradient"):
            jax.grad(lambda *arrays, f=wrapped: f(*arrays).sum(), argnums=argument)(*given)


def test_kernels_have_no_derivative():
    cache = tq.init_cache(tq.CacheSpec.recommended(1, 64, 256), batch=1)
    cache = tq.append(cache, jnp.ones((1, 150, 1, 64)), jnp.ones((1, 150, 1, 64)))
    query, key = jnp.ones((1, 1, 2, 64)), jnp.ones((1, 1, 1, 64))

    def attend(query, key):
        return tq.attend(query, cache, chunk=(key, key), implementation="triton")

    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match=r"attend by GPU kernels: implementation='reference' has"):
            jax.jacfwd(attend, argnums=argument)(query, key)
