"""A cache that keeps every token as it came, and reads compressed tokens as a rival's codes would give them back.

The procedure is the real cache's: the same sink tokens and latest tokens in full precision, the same bfloat16 tokens
given to the quantizer, the same chunks. Only the tokens in between differ.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.layer import JointHeads
from pallas_kernels.pytree import pytree
from tq_jax.commands.rivals.calibrated import compiled_with
from tq_jax.commands.rivals.roundings import Calibrated, Rival, Rounding
from tq_jax.models import Decoder

ROUND_TO = 128
"""The capacity of a cache is a multiple of so many tokens."""


@dataclasses.dataclass(frozen=True)
class KeptTokens:
    """Keys and values as they came; subclasses say how tokens are rounded when they are read.

    Attributes:
        keys: bfloat16 [rows, tokens, h_kv, d].
        values: bfloat16 [rows, tokens, h_kv, d].
        length: Tokens of every row, int32.
    """

    keys: Float[Array, "rows n h_kv d"]
    values: Float[Array, "rows n h_kv d"]
    length: Int[Array, ""]


Kept = TypeVar("Kept", bound=KeptTokens)


@pytree
class RivalCache(KeptTokens):
    """Kept tokens that are read as a rival rounds them.

    Attributes:
        window: Number of latest tokens that are read in full precision, int32.
        sinks: Number of first tokens that are read in full precision, int32.
        chosen: Index of the rival among `rivals`, int32.
        layers: Layers of the model; row r belongs to layer r // (rows / layers). Static.
        rivals: Every rival that one compiled function serves. Static.
        fitted: Calibrations of keys and values; empty for parts that need none.
    """

    window: Int[Array, ""]
    sinks: Int[Array, ""]
    chosen: Int[Array, ""]
    layers: int = dataclasses.field(metadata={"static": True})
    rivals: tuple[Rival, ...] = dataclasses.field(metadata={"static": True})
    fitted: tuple[Any, Any] = ((), ())


def empty(
    rival: Rival, *, rows: int, layers: int, max_tokens: int, heads: tuple[int, int], window: int, sinks: int
) -> RivalCache:
    """A cache without tokens.

    Args:
        rival: How tokens are rounded.
        rows: Sequences times layers.
        layers: Layers of the model.
        max_tokens: Capacity of a row, tokens.
        heads: Number of KV heads, and channels of each.
        window: Number of latest tokens in full precision.
        sinks: Number of first tokens in full precision.
    """
    pool = jnp.zeros((rows, -(-max_tokens // ROUND_TO) * ROUND_TO, *heads), jnp.bfloat16)
    rivals = compiled_with(rival)
    numbers = [jnp.asarray(x, jnp.int32) for x in (0, window, sinks, rivals.index(rival))]
    return RivalCache(pool, jnp.zeros_like(pool), *numbers, layers=layers, rivals=rivals)


@functools.partial(jax.jit, donate_argnums=0)
def fill(
    cache: RivalCache,
    key: Float[Array, "rows t h_kv d"],
    value: Float[Array, "rows t h_kv d"],
    length: Int[Array, ""],
) -> RivalCache:
    """Appends the first `length` tokens of a prompt to every row; the cache is donated."""
    return dataclasses.replace(with_tokens(cache, key, value, 0, 0), length=length)


def with_tokens(
    cache: Kept,
    key: Float[Array, "rows t h_kv d"],
    value: Float[Array, "rows t h_kv d"],
    row: Int[Array, ""] | int,
    start: Int[Array, ""] | int,
) -> Kept:
    """The cache with new tokens, written from a row and a position on."""
    pools = [
        lax.dynamic_update_slice(pool, new.astype(pool.dtype), (row, start, 0, 0))
        for pool, new in ((cache.keys, key), (cache.values, value))
    ]
    return dataclasses.replace(cache, keys=pools[0], values=pools[1])


Read = Callable[[Kept, Int[Array, "b"]], tuple[Float[Array, "b n h_kv d"], Float[Array, "b n h_kv d"]]]
"""Gives keys and values of some rows of a cache as they are read, float32."""


def extend_dense(
    decoder: Decoder, tokens: Int[Array, "1 t"], cache: Kept, count: Int[Array, ""] | None, read: Read
) -> tuple[Float[Array, "t vocab"], Kept]:
    """Appends a chunk, or its first `count` tokens, and predicts the token after each; see `Decoder.extend`.

    Args:
        decoder: The model.
        tokens: The chunk.
        cache: Keys and values as they came.
        count: Number of tokens that are appended; None for all.
        read: What attention reads.

    Returns:
        Next-token logits, and the cache.
    """
    start = cache.length

    def mix(joint: JointHeads, carried: Kept, rows: Array, *, window: int | None, **options: Any):
        heads = joint.split()
        stored = with_tokens(carried, heads.key, heads.value, rows[0], start)
        keys, values = read(stored, rows)
        mixed = attend_dense(heads.query, keys, values, start, sliding_window=window, **options)
        return mixed.astype(heads.query.dtype), stored, None

    cache = dataclasses.replace(cache, length=start + (tokens.shape[1] if count is None else count))
    hidden, cache, _ = decoder.run(tokens, cache, start[None], mix)
    return decoder.logits(hidden)[0], cache


@functools.partial(jax.jit, donate_argnums=2)
def extend(
    decoder: Decoder, tokens: Int[Array, "1 t"], cache: RivalCache, count: Int[Array, ""] | None
) -> tuple[Float[Array, "t vocab"], RivalCache]:
    """`extend_dense` on a rival's tokens, compiled; the cache is donated."""

    def read(stored: RivalCache, rows: Array) -> tuple[Array, Array]:
        layer = rows[0] // (stored.keys.shape[0] // stored.layers)
        return seen(stored, stored.keys[rows], stored.values[rows], layer)

    return extend_dense(decoder, tokens, cache, count, read)


def seen(
    cache: RivalCache, keys: Float[Array, "b n h d"], values: Float[Array, "b n h d"], layer: Int[Array, ""]
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h d"]]:
    """Tokens of a layer as they are read, float32."""
    place = jnp.arange(keys.shape[1], dtype=jnp.int32)
    count = jnp.maximum(cache.length - cache.window - cache.sinks, 0)
    edge = jnp.asarray([rival.exact_layers for rival in cache.rivals], jnp.int32)[cache.chosen]
    coded = place < jnp.where((layer < edge) | (layer >= cache.layers - edge), 0, count)

    def read(tokens: Array, rounding: Rounding | Calibrated, fitted: Any) -> Array:
        # Groups of tokens begin after the sink tokens.
        tokens = jnp.roll(tokens.astype(jnp.float32), -cache.sinks, axis=1)
        calibrated = isinstance(rounding, Calibrated)
        rounded = rounding.read(tokens, fitted) if calibrated else rounding(tokens, coded)
        return jnp.roll(jnp.where(coded[None, :, None, None], rounded, tokens), cache.sinks, axis=1)

    def read_both(rival: Rival) -> Callable[[], tuple[Array, Array]]:
        key, value = jax.tree.map(lambda x: x[layer], cache.fitted)
        return lambda: (read(keys, rival.key, key), read(values, rival.value, value))

    return lax.switch(cache.chosen, [read_both(rival) for rival in cache.rivals])


@jax.jit
def seen_everywhere(cache: RivalCache) -> tuple[Float[Array, "rows n h_kv d"], Float[Array, "rows n h_kv d"]]:
    """Tokens of all rows as they are read."""
    layer = jnp.arange(cache.keys.shape[0], dtype=jnp.int32) // (cache.keys.shape[0] // cache.layers)

    def read(arrays: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        keys, values = seen(cache, arrays[0][None], arrays[1][None], arrays[2])
        return keys[0], values[0]

    return lax.map(read, (cache.keys, cache.values, layer))


def attend_dense(
    query: Float[Array, "b t h_q d"],
    keys: Float[Array, "b n h_kv d"],
    values: Float[Array, "b n h_kv d"],
    start: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Float[Array, "h_q"] | None = None,
    sliding_window: int | Int[Array, ""] | None = None,
) -> Float[Array, "b t h_q d"]:
    """Causal attention of t tokens at positions start, start + 1, ... to tokens 0, 1, ..., without compression."""
    logits = dense_logits(query, keys) * scale
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    age = start + jnp.arange(query.shape[1])[:, None] - jnp.arange(keys.shape[1])[None]
    visible = (age >= 0) if sliding_window is None else (age >= 0) & (age < sliding_window)
    logits = jnp.where(visible, logits, -jnp.inf)
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32).reshape(1, *logits.shape[1:3], 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks, (*logits.shape[:4], 1))], axis=-1)
    weight = jax.nn.softmax(logits, axis=-1)[..., : keys.shape[1]]
    return jnp.einsum("bhgtn,bnhd->bthgd", weight, values).reshape(query.shape)


def dense_logits(query: Float[Array, "b t h_q d"], keys: Float[Array, "b n h_kv d"]) -> Float[Array, "b h_kv g t n"]:
    """<q, k> of every query and key, float32."""
    grouped = query.astype(jnp.float32).reshape(*query.shape[:2], keys.shape[2], -1, query.shape[3])
    return jnp.einsum("bthgd,bnhd->bhgtn", grouped, keys)
