"""An oracle of the cache: dense tokens, where each token that left the window is replaced by its decoded codes."""

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq

LEAST_TOKENS = 32
"""Least number of keys for centring."""


@jax.jit
def _round_trip(quantizer: tq.Quantizer, x: jax.Array) -> jax.Array:
    return tq.dequantize(quantizer, tq.quantize(quantizer, x))


def fake_quantize(quantizer: tq.Quantizer, x: np.ndarray) -> np.ndarray:
    """Vectors [n, h, d] decoded from their codes; padded, so that few sizes are compiled."""
    size = max(64, 1 << (len(x) - 1).bit_length())
    padded = np.zeros((size, *x.shape[1:]), np.float32)
    padded[: len(x)] = x
    return np.asarray(_round_trip(quantizer, jnp.asarray(padded)))[: len(x)]


class FakeQuantRow:
    """One sequence of dense tokens, appended and cropped. Keys are centred; channels are not weighted."""

    def __init__(self, spec: tq.CacheSpec, seed: int = 0) -> None:
        assert not spec.smooth_keys
        self.spec = spec
        self.quantizers = tq.make_quantizer(spec.key, seed=seed), tq.make_quantizer(spec.value, seed=seed + 1)
        self.k = self.v = np.zeros((0, spec.num_kv_heads, spec.head_dim), np.float32)
        self.compressed, self.mean = 0, None

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        round_to = jnp.dtype(self.spec.dtype)
        self.k, self.v = (
            np.concatenate([old, new.astype(round_to).astype(np.float32)]) for old, new in ((self.k, k), (self.v, v))
        )
        start = self.spec.sinks + self.compressed
        count = max(len(self.k) - start - self.spec.ring, 0)
        if not count:
            return
        if self.mean is None:
            known = self.k[self.spec.sinks :]
            wanted = self.spec.center_keys and len(known) >= LEAST_TOKENS
            self.mean = known.mean(0) if wanted else np.zeros_like(known[0])
        old = slice(start, start + count)
        self.k, self.v = self.k.copy(), self.v.copy()
        self.k[old] = fake_quantize(self.quantizers[0], self.k[old] - self.mean) + self.mean
        self.v[old] = fake_quantize(self.quantizers[1], self.v[old])
        self.compressed += count

    def crop(self, length: int) -> None:
        self.k, self.v = self.k[:length], self.v[:length]
        self.compressed = min(self.compressed, max(len(self.k) - self.spec.sinks, 0))

    def attend(self, q: np.ndarray) -> np.ndarray:
        """Causal attention of the last queries [t, h_q, d] in float64."""
        group, n, t = q.shape[1] // self.k.shape[1], len(self.k), len(q)
        k, v = (np.repeat(x.astype(np.float64), group, 1) for x in (self.k, self.v))
        logits = np.einsum("thd,shd->hts", q.astype(np.float64), k) * q.shape[-1] ** -0.5
        logits = np.where(np.arange(n)[None] <= np.arange(n - t, n)[:, None], logits, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v)
