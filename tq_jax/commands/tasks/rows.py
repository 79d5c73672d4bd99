"""Several sequences of different lengths that decode from a rival's codes; see `tq_jax.commands.rivals.cache`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.layer import JointHeads
from pallas_kernels.pytree import pytree
from tq_jax.commands.divergence import run_prompt
from tq_jax.commands.rivals.cache import ROUND_TO, RivalCache, attend_dense, seen
from tq_jax.commands.rivals.calibrated import compiled_with, fit
from tq_jax.commands.rivals.roundings import Calibrated, Rival
from tq_jax.models import Decoder
from tq_jax.models.last_token import last_places, token_of


@pytree
class RivalRows:
    """Tokens of all layers as they came, row `layer * b + sequence`.

    Attributes:
        keys: bfloat16 [layers * b, tokens, h_kv, d].
        values: bfloat16 [layers * b, tokens, h_kv, d].
        lengths: Tokens of each sequence, int32 [b].
        window: Number of latest tokens that are read in full precision, int32.
        sinks: Number of first tokens that are read in full precision, int32.
        chosen: Index of the rival among `rivals`, int32.
        rivals: Every rival that one compiled function serves. Static.
        fitted: Calibrations of keys and values; see `RivalCache`.
    """

    keys: Float[Array, "rows n h_kv d"]
    values: Float[Array, "rows n h_kv d"]
    lengths: Int[Array, "b"]
    window: Int[Array, ""]
    sinks: Int[Array, ""]
    chosen: Int[Array, ""]
    rivals: tuple[Rival, ...] = dataclasses.field(metadata={"static": True})
    fitted: tuple[Any, Any] = ((), ())


def fill_rows(
    decoder: Decoder, tokens: Int[Array, "b t"], lengths: Int[Array, "b"], empty: RivalRows
) -> tuple[Float[Array, "b vocab"], RivalRows]:
    """Runs prompts with exact attention: logits of the next tokens, and the rows with the prompts."""
    hidden, (_, key, value) = decoder.projections(tokens)
    last = token_of(hidden, last_places(tokens, lengths))
    keys, values = (
        pool.at[:, : new.shape[1]].set(new.astype(pool.dtype))
        for pool, new in ((empty.keys, key), (empty.values, value))
    )
    return decoder.logits(last)[:, 0], dataclasses.replace(empty, keys=keys, values=values, lengths=lengths)


def extend_rows(
    decoder: Decoder, token: Int[Array, "b"], active: Int[Array, "b"], rows: RivalRows
) -> tuple[Float[Array, "b vocab"], RivalRows]:
    """Appends one token to each sequence and predicts the next.

    Args:
        decoder: The model.
        token: The tokens.
        active: 1 for sequences that take their token, 0 for sequences that stay as they are.
        rows: The sequences.

    Returns:
        Logits, meaningless for sequences that are not active, and the rows.
    """
    start = rows.lengths

    def mix(joint: JointHeads, carried: RivalRows, places: Array, **options: Any):
        heads, layer = joint.split(), places[0] // start.shape[0]
        keys, values = (
            pool.at[places, start].set(new[:, 0].astype(pool.dtype))
            for pool, new in ((carried.keys, heads.key), (carried.values, heads.value))
        )
        carried = dataclasses.replace(carried, keys=keys, values=values)
        mixed = _attend(heads.query, carried, keys[places], values[places], start, layer, options)
        return mixed.astype(heads.query.dtype), carried, None

    rows = dataclasses.replace(rows, lengths=start + active)
    hidden, rows, _ = decoder.run(token[:, None], rows, start, mix)
    return decoder.logits(hidden)[:, 0], rows


def _attend(
    query: Array, rows: RivalRows, keys: Array, values: Array, start: Array, layer: Array, options: dict[str, Any]
) -> Array:
    """Each sequence alone, because which of its tokens are compressed depends on its length."""
    layers = rows.keys.shape[0] // start.shape[0]
    limits, window = (rows.window, rows.sinks, rows.chosen), options.pop("window")

    def attend(query: Array, keys: Array, values: Array, start: Array) -> Array:
        alone = RivalCache(
            keys[None], values[None], start + 1, *limits, layers=layers, rivals=rows.rivals,
            fitted=rows.fitted,
        )  # fmt: skip
        read = seen(alone, keys[None], values[None], layer)
        return attend_dense(query[None], *read, start, sliding_window=window, **options)[0]

    return jax.vmap(attend)(query, keys, values, start)


def empty_rows(decoder: Decoder, rival: Rival, *, batch: int, max_tokens: int, window: int, sinks: int) -> RivalRows:
    """Sequences without tokens.

    Args:
        decoder: The model.
        rival: How tokens are rounded.
        batch: Number of sequences.
        max_tokens: Capacity of a sequence, tokens.
        window: Number of latest tokens in full precision.
        sinks: Number of first tokens in full precision.
    """
    config, rivals = decoder.config, compiled_with(rival)
    room = (config.num_layers * batch, -(-max_tokens // ROUND_TO) * ROUND_TO, config.num_kv_heads, config.head_dim)
    keys, values = (jnp.zeros(room, jnp.bfloat16) for _ in range(2))
    numbers = [jnp.asarray(x, jnp.int32) for x in (window, sinks, rivals.index(rival))]
    return RivalRows(keys, values, jnp.zeros(batch, jnp.int32), *numbers, rivals=rivals)


def calibrate(
    decoder: Decoder, rival: Rival, rows: RivalRows, tokens: Int[Array, "b t"], lengths: Int[Array, "b"]
) -> RivalRows:
    """The rows with a calibration of their rival on some prompts; as they are if the rival needs none."""
    if not any(isinstance(part, Calibrated) for part in (rival.key, rival.value)):
        return rows
    valid = np.arange(tokens.shape[1])[None] < np.asarray(lengths)[:, None]
    _, projections = run_prompt(decoder, tokens)
    query, key, value = (
        np.asarray(x, np.float32).reshape(-1, *tokens.shape, *x.shape[2:])[:, valid] for x in projections
    )
    return dataclasses.replace(rows, fitted=fit(rival, query, key, value, key.shape[1]))
