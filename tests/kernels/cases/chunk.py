"""Cases for exact attention of a chunk over itself: types, head dims, odd lengths and masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import LogitOptions, Partial

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Largest relative error of a type."""

PLAIN, BOTH = LogitOptions(0.1), LogitOptions(0.3, softcap=2.0, sliding_window=17)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shape [batch, tokens, query heads of two KV heads, head_dim], type and mask of a chunk."""

    shape: tuple[int, int, int, int]
    dtype: str = "float32"
    options: LogitOptions = PLAIN


CASES = {
    "float32": Case((2, 100, 6, 64)),
    "float32, window, soft-cap": Case((2, 70, 2, 128), options=BOTH),
    "float32, dim 80": Case((1, 37, 4, 80)),
    "bfloat16": Case((2, 100, 8, 128), "bfloat16"),
    "bfloat16, window": Case((2, 90, 4, 64), "bfloat16", LogitOptions(0.2, sliding_window=17)),
    "bfloat16, soft-cap, dim 256": Case((1, 20, 4, 256), "bfloat16", BOTH),
    "float16, one token": Case((3, 1, 4, 64), "float16"),
}
"""Cases by name."""


def make_chunk(case: Case) -> tuple[tuple[jax.Array, ...], LogitOptions]:
    """Queries, keys and values of a case, and its options."""
    rng = np.random.default_rng(0)
    b, t, heads, d = case.shape
    arrays = (jnp.asarray(rng.standard_normal((b, t, h, d)), case.dtype) for h in (heads, 2, 2))
    return tuple(arrays), case.options


def close(got: Partial | jax.Array, want: Partial | jax.Array, dtype: jnp.dtype) -> None:
    """Outputs and log-sum-exps agree, relative to the largest."""
    pairs = [(got, want)]
    if isinstance(got, Partial) and isinstance(want, Partial):
        pairs = [(x.acc / x.total[..., None], x.peak + jnp.log(x.total)) for x in (got, want)]
        pairs = list(zip(*pairs, strict=True))
    for a, b in pairs:
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.abs(a - b).max() <= TOLERANCE[dtype.name] * np.abs(b).max()
