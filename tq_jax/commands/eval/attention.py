"""The effect of compressed keys and values on attention: errors of its outputs, correlation of its logits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import tq_jax as tq
from pallas_kernels.lookup import decode
from pallas_kernels.pages import read_pages
from tq_jax.attention_reference import exact_positions
from tq_jax.cache import from_storage
from tq_jax.commands.rivals.cache import attend_dense, dense_logits
from tq_jax.quantizer import from_rotated

LAST_QUERIES = 64
"""Number of queries, the last ones of the prompt, that attend to the prompt."""


@dataclasses.dataclass(frozen=True)
class AttentionQuality:
    """Attention of the same queries to a cache and to full precision, compared.

    Attributes:
        error: Relative error of the outputs (root mean square), float32 [layers, heads].
        correlation: Correlation of the logits of compressed tokens, float32 [layers]. The mean of each query's logits
            is subtracted first, because softmax ignores it.
    """

    error: np.ndarray
    correlation: np.ndarray

    def as_dict(self) -> dict[str, float | int | list]:
        """The figures as plain data."""
        layer, head = np.unravel_index(np.argmax(self.error), self.error.shape)
        return {
            "logit_correlation_worst": float(self.correlation.min()),
            "logit_correlation_worst_layer": int(self.correlation.argmin()),
            "attention_error": float(np.sqrt(np.mean(np.square(self.error)))),
            "attention_error_worst": float(self.error.max()),
            "attention_error_worst_layer_and_head": [int(layer), int(head)],
            "attention_errors": np.round(self.error.astype(np.float64), 4).tolist(),
        }


@functools.partial(jax.jit, static_argnames=("scale", "softcap"))
def compare_attention(
    projections: tuple[Array, Array, Array],
    keys: Float[Array, "rows n h_kv d"],
    values: Float[Array, "rows n h_kv d"],
    coded: Bool[Array, "n"],
    windows: Int[Array, "rows"],
    sink_logits: Float[Array, "rows h_q"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "rows h_q"], Float[Array, "rows"]]:
    """Errors of the outputs and correlations of the logits, layer by layer; see `AttentionQuality`.

    Args:
        projections: Queries, keys and values of n tokens in full precision; see `Decoder.projections`.
        keys: Keys as they are read from a cache.
        values: Values as they are read from a cache.
        coded: Whether each token is compressed.
        windows: Sliding window of each layer, tokens.
        sink_logits: Learned logits of each layer; None if there are none.
        scale: Factor of <q, k>.
        softcap: Bound of logits; None if there is none.
    """
    start = jnp.int32(max(keys.shape[1] - LAST_QUERIES, 0))

    def layer(inputs: tuple[tuple[Array, ...], Array | None]) -> tuple[Array, Array]:
        arrays, sinks = inputs
        how: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logits": sinks}
        query, key, value, seen_key, seen_value = (x[None] for x in arrays[:5])
        query = query[:, -LAST_QUERIES:]
        exact, seen = (
            attend_dense(query, *pair, start, sliding_window=arrays[5], **how)[0]
            for pair in ((key, value), (seen_key, seen_value))
        )
        errors = jnp.sum(jnp.square(seen - exact), axis=(0, 2)) / jnp.sum(jnp.square(exact), axis=(0, 2))
        place, step = jnp.arange(keys.shape[1])[None], jnp.arange(query.shape[1])[:, None]
        visible = coded[None] & (place <= start + step)
        logits = [_centred(dense_logits(query, k), visible) for k in (key, seen_key)]
        product = jnp.sum(logits[0] * logits[1])
        return jnp.sqrt(errors), product / jnp.sqrt(jnp.sum(logits[0] ** 2) * jnp.sum(logits[1] ** 2))

    return lax.map(layer, ((*projections, keys, values, windows), sink_logits))


def _centred(logits: Float[Array, "b h g t n"], mask: Bool[Array, "t n"]) -> Float[Array, "b h g t n"]:
    mask = jnp.broadcast_to(mask, logits.shape)
    count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.float32), 1.0)
    mean = jnp.sum(jnp.where(mask, logits, 0.0), axis=-1, keepdims=True) / count
    return jnp.where(mask, logits - mean, 0.0)


@jax.jit
def read_back(cache: tq.Cache) -> tuple[Float[Array, "rows n h_kv d"], Float[Array, "rows n h_kv d"]]:
    """Keys and values of every token, read from the codes and the full-precision slots: [rows, max_tokens, h, d].

    Raises:
        NotImplementedError: For keys with a sketch.
    """
    spec = cache.spec
    rows = jnp.arange(cache.rows, dtype=jnp.int32)
    position, stored = exact_positions(cache, rows)
    place = rows[:, None], jnp.where(stored, position, spec.max_tokens)
    exact = [jnp.swapaxes(from_storage(spec, x), 1, 2) for x in (cache.exact_keys, cache.exact_values)]
    tokens = _read_codes(cache) if cache.pages is not None else [jnp.zeros((cache.rows, 0, *exact[0].shape[2:]))] * 2
    size = spec.sinks + tokens[0].shape[1]
    out = []
    for coded, kept in zip(tokens, exact, strict=True):
        pool = jnp.zeros((cache.rows, max(size, spec.max_tokens), *kept.shape[2:]), jnp.float32)
        pool = pool.at[:, spec.sinks : size].set(coded)[:, : spec.max_tokens]
        out.append(pool.at[place].set(kept, mode="drop"))
    return out[0], out[1]


def _read_codes(cache: tq.Cache) -> list[Array]:
    spec, statistics = cache.spec, cache.statistics
    assert cache.pages is not None and cache.key_quantizer is not None and cache.value_quantizer is not None
    assert spec.key is not None and spec.value is not None
    if spec.key.kind == "prod":
        raise NotImplementedError("keys are read back without a sketch; got kind='prod'")
    ids = jnp.arange(cache.rows * spec.pages_per_row, dtype=jnp.int32).reshape(cache.rows, -1)
    coded_keys, coded_values = read_pages(cache.pages, ids)
    keys = from_rotated(cache.key_quantizer, decode(coded_keys, spec.key.format))
    values = jnp.swapaxes(decode(coded_values, spec.value.format, axis=-2), -1, -2)
    values = from_rotated(cache.value_quantizer, values)
    keys, values = (  # [rows, pages, h_kv, tokens, d] to [rows, tokens, h_kv, d]
        jnp.swapaxes(x, 2, 3).reshape(cache.rows, -1, spec.num_kv_heads, spec.head_dim) for x in (keys, values)
    )
    if statistics is not None:
        keys = keys / statistics.weight[:, None] + statistics.mean[:, None]
    return [keys, values]
