"""Cases of attention with heads that the first launch splits: caches, and joint products with norms or without."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layer import JointHeads, NormWeights
from tests.kernels.cases.whole_cache import Case, filled_cache, make_spec, relative_error
from tq_jax.attention import attend, attend_joint
from tq_jax.cache import Cache

LENGTHS = (333, 1, 0, 41)
SPECS = {
    "K4/V4": make_spec(64),
    "K2.5/V3.5": make_spec(128, bits=(2.5, 3.5)),
    "no statistics": make_spec(64, center_keys=False, smooth_keys=False),
    "no slots": make_spec(64, window=0, sink_tokens=0),
    "float32 slots": make_spec(64, dtype="float32"),
    "prod": make_spec(128, key={"kind": "prod", "bits": 3}),
}
SHAPES = {"one query": (1, 4, False), "5 queries, norms": (5, 3, True)}
"""Tokens, query heads per KV head, and whether heads have norms."""


def joint_case(name: str, *, count: int, group: int, norms: bool) -> tuple[JointHeads, Cache]:
    """A joint product in bfloat16, and a filled cache."""
    cache, _ = filled_cache(SPECS[name], LENGTHS, group=group)
    spec = cache.spec
    keys = jax.random.split(jax.random.key(0), 3)
    dim = spec.head_dim
    product = jax.random.normal(keys[0], (len(LENGTHS), count, spec.num_kv_heads, group + 2, dim))
    angles = jax.random.normal(keys[1], (len(LENGTHS), count, dim // 2))
    norm = NormWeights(1 + 0.1 * jax.random.normal(keys[2], (dim,)).astype(jnp.bfloat16), 1e-5) if norms else None
    return JointHeads(product.astype(jnp.bfloat16), (jnp.cos(angles), jnp.sin(angles)), norm, norm), cache


def check_parity(name: str, shape: str) -> None:
    """Compares kernels that split the heads themselves with heads split before, with the reference and with a rerun."""
    count, group, norms = SHAPES[shape]
    joint, cache = joint_case(name, count=count, group=group, norms=norms)
    lengths = jnp.array([count, max(count - 2, 1), 0, count])
    options = {"rows": jnp.array([2, 0, 3, 1]), "lengths": lengths, "sliding_window": 200, "scale": 0.2}
    heads = joint.split()
    want = attend(heads.query, cache, chunk=(heads.key, heads.value), implementation="triton", **options)
    got, split = attend_joint(joint, cache, implementation="triton", **options)
    assert got.dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_allclose(*_as_float32(a, b), rtol=2**-7, atol=2**-7), split, heads)
    tolerance = Case(cache.spec, count=count, group=group, dtype="bfloat16").tolerance(precise=False)
    assert relative_error(got, want) <= tolerance
    again, _ = attend_joint(joint, cache, implementation="triton", **options)
    np.testing.assert_array_equal(again, got)
    plain, _ = attend_joint(joint, cache, implementation="reference", **options)
    assert relative_error(got, plain) <= tolerance


def _as_float32(*arrays: jax.Array) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(x, np.float32) for x in arrays)
