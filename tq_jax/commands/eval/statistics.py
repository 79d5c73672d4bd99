"""Key statistics other than those that caches use, for ablation.

All keys share a component, mostly the bias of the key projection. Rotary positions turn this component, so that
subtracting a constant mean leaves much of it. The mean of the keys before they were turned, turned to each position,
leaves less; but to read such keys, every logit needs a product of the query with features of the key's position.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import tq_jax as tq
from pallas_kernels.layer.heads import turned
from pallas_kernels.pytree import pytree
from tq_jax.commands.divergence import Reference, fill_cache
from tq_jax.commands.eval.schemes import Packed
from tq_jax.commands.rivals.cache import KeptTokens, extend_dense
from tq_jax.models import Decoder, DecoderConfig
from tq_jax.models.rope import rotary_frequencies
from tq_jax.quantizer import Quantizer
from tq_jax.statistics import BALANCE


@dataclasses.dataclass(frozen=True)
class Smoothed(Packed):
    """A cache with other weights of channels, computed from the same tokens.

    Attributes:
        powers: Exponents of the queries' and of the keys' spread in the weight of a channel.
    """

    powers: tuple[float, float] = (BALANCE, BALANCE)

    def start(self, decoder: Decoder, reference: Reference) -> tq.Cache:
        """A cache that holds the prefix; see `Runner`."""
        query, key, _ = reference.projections
        statistics = channel_statistics(query, key[:, self.scheme.cache.sinks :], self.powers)
        cache = tq.init_cache(self.scheme.cache, batch=decoder.config.num_layers, statistics=statistics)
        return fill_cache(cache, *reference.projections, jnp.int32(reference.prefix))


@functools.partial(jax.jit, static_argnames="powers")
def channel_statistics(
    query: Float[Array, "rows n h_q d"], key: Float[Array, "rows m h_kv d"], powers: tuple[float, float]
) -> tuple[Float[Array, "rows h_kv d"], Float[Array, "rows h_kv d"]]:
    """Mean of the keys, and weights: the queries' root mean square over the keys' deviation, each to its power.

    Args:
        query: Queries.
        key: Keys.
        powers: Exponents of the queries' and of the keys' spread.
    """
    mean = jnp.mean(key, axis=1)
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    spread = jnp.sqrt(jnp.mean(jnp.square(key - mean[:, None]), axis=1))
    wanted = jnp.sqrt(jnp.mean(jnp.square(grouped), axis=(1, 3)))
    floored = [jnp.maximum(x, 1e-2 * jnp.mean(x, axis=-1, keepdims=True)) for x in (wanted, spread)]
    return mean, floored[0] ** powers[0] / floored[1] ** powers[1]


@pytree
class TurnedCache(KeptTokens):
    """Kept tokens, a row per layer, that are read around a turning mean of the keys.

    Attributes:
        mean: Mean of the keys before they were turned, float32 [layers, h_kv, d].
        weight: Factors of the centred keys before they are quantized, float32 [layers, h_kv, d].
        frequency: Rotary frequencies of each layer, float32 [layers, d / 2].
        quantizers: Quantizers of keys and of values.
        spec: Spec of the packed cache that stores the same tokens. Static.
    """

    mean: Float[Array, "rows h_kv d"]
    weight: Float[Array, "rows h_kv d"]
    frequency: Float[Array, "rows half"]
    quantizers: tuple[Quantizer, Quantizer]
    spec: tq.CacheSpec = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Turned(Packed):
    """A cache that subtracts a turning mean from its keys; tokens are rounded as they would be stored."""

    def start(self, decoder: Decoder, reference: Reference) -> TurnedCache:
        """A cache that holds the prefix; see `Runner`."""
        return _start(decoder, reference.projections, jnp.int32(reference.prefix), self.scheme.cache)

    def extend(
        self, decoder: Decoder, tokens: Int[Array, "1 t"], cache: TurnedCache, *, count: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "t vocab"], TurnedCache]:
        """Appends a chunk and predicts; see `Runner`."""
        return _extend(decoder, tokens, cache, count)

    def read(self, decoder: Decoder, reference: Reference) -> tuple[Array, Array]:
        """Keys and values of the prefix as attention reads them; see `Candidate`."""
        keys, values = _seen_everywhere(self.start(decoder, reference))
        return keys[:, : reference.prefix], values[:, : reference.prefix]


@functools.partial(jax.jit, static_argnames="spec")
def _start(
    decoder: Decoder, projections: tuple[Array, Array, Array], length: Int[Array, ""], spec: tq.CacheSpec
) -> TurnedCache:
    query, key, value = projections
    config = decoder.config
    frequency = jnp.stack([_frequencies(config, layer) for layer in range(config.num_layers)])
    mean = jnp.mean(_turn(key, -frequency)[:, spec.sinks :], axis=1)
    rest = key - _turn(jnp.broadcast_to(mean[:, None], key.shape), frequency)
    _, weight = channel_statistics(query, rest[:, spec.sinks :], (BALANCE, BALANCE))
    room = ((0, 0), (0, spec.max_tokens - key.shape[1]), (0, 0), (0, 0))
    keys, values = (jnp.pad(x.astype(jnp.bfloat16), room) for x in (key, value))
    assert spec.key is not None and spec.value is not None
    quantizers = tq.make_quantizer(spec.key, seed=0), tq.make_quantizer(spec.value, seed=1)
    return TurnedCache(keys, values, length, mean, weight, frequency, quantizers, spec)


def _frequencies(config: DecoderConfig, layer: int) -> Float[Array, "half"]:
    """The rotary frequencies of a layer."""
    base, scaling = config.rope(config.layer_windows[layer])
    turning = config.rotary_dim if config.layer_positions[layer] else 0
    return rotary_frequencies(head_dim=config.head_dim, base=base, scaling=scaling, rotary_dim=turning)


@functools.partial(jax.jit, donate_argnums=2)
def _extend(
    decoder: Decoder, tokens: Int[Array, "1 t"], cache: TurnedCache, count: Int[Array, ""] | None
) -> tuple[Float[Array, "t vocab"], TurnedCache]:
    return extend_dense(decoder, tokens, cache, count, _seen)


@jax.jit
def _seen_everywhere(cache: TurnedCache) -> Any:
    found = lax.map(lambda row: _seen(cache, row[None]), jnp.arange(cache.keys.shape[0], dtype=jnp.int32))
    return jax.tree.map(lambda x: x[:, 0], found)


def _seen(cache: TurnedCache, rows: Int[Array, "b"]) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h d"]]:
    """Keys and values of some layers as they are read, float32."""
    spec, place = cache.spec, jnp.arange(cache.keys.shape[1], dtype=jnp.int32)
    coded = ((place >= spec.sinks) & (place < cache.length - spec.window))[None, :, None, None]
    keys, values = (x[rows].astype(jnp.float32) for x in (cache.keys, cache.values))
    mean = _turn(jnp.broadcast_to(cache.mean[rows][:, None], keys.shape), cache.frequency[rows])
    weight = cache.weight[rows][:, None]
    key_quantizer, value_quantizer = cache.quantizers
    rounded = tq.dequantize(key_quantizer, tq.quantize(key_quantizer, (keys - mean) * weight)) / weight + mean
    kept = tq.dequantize(value_quantizer, tq.quantize(value_quantizer, values))
    return jnp.where(coded, rounded, keys), jnp.where(coded, kept, values)


def _turn(x: Float[Array, "b n h d"], frequency: Float[Array, "b half"]) -> Float[Array, "b n h d"]:
    """Turns vectors to positions 0, 1, ...; negative frequencies turn them back."""
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[None, :, None] * frequency[:, None]
    return turned(x, (jnp.cos(angles), jnp.sin(angles)))
