"""Small caches and tokens for them."""

import jax.numpy as jnp
import numpy as np

import tq_jax as tq

H, D = 2, 32
KEY = tq.QuantizerSpec(D, 4, search=True, scale="unbiased")
VALUE = tq.QuantizerSpec(D, 3)
PROD = tq.QuantizerSpec(D, 3, kind="prod")
GROUP = tq.QuantizerSpec(D, 2, kind="group")


def make_spec(**options):
    defaults = dict(
        num_kv_heads=H, head_dim=D, max_tokens=200, key=KEY, value=VALUE, window=24, sink_tokens=4, page_size=16
    )
    return tq.CacheSpec(**(defaults | options))


def tokens(batch, count, seed=0):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, batch, count, H, D)).astype(np.float32)
    return jnp.asarray(k + 2), jnp.asarray(v), jnp.asarray(rng.standard_normal((batch, count, 2 * H, D)), jnp.float32)
