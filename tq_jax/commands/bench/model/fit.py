"""The largest batch and the longest context that a device holds, computed from measured memory."""

from collections.abc import Callable, Sequence
from typing import Any

from tq_jax.commands.bench.job import Row
from tq_jax.commands.bench.model.caches import Kind
from tq_jax.models import DecoderConfig

REFERENCE_TOKENS = 32768
"""Context at which the largest batch is computed; less if nothing as long was measured."""

STEP_TOKENS = 1024
"""Contexts are computed in multiples of so many tokens."""

CEILING = 2**27
"""Largest number that is tried."""


def largest(fits: Callable[[int], bool], ceiling: int = CEILING) -> int:
    """The largest number that fits, at most the ceiling; 0 if not even 1 does.

    Args:
        fits: Whether a number fits; all smaller ones then fit too.
        ceiling: The ceiling.

    Example:
        >>> largest(lambda n: n * n <= 50), largest(lambda n: False), largest(lambda n: True, 10)
        (7, 0, 10)
    """
    low, high = 0, 1
    while high <= ceiling and fits(high):
        low, high = high, 2 * high
    high = min(high, ceiling + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def compute(
    rows: Sequence[Row], configs: dict[str, DecoderConfig], kinds: Sequence[Kind], limit: int, *, devices: int = 1
) -> list[Row]:
    """What fits for every decoder and cache that was measured.

    The room for a cache is what the device allows, less the weights, less what the largest measured load of that cache
    needed beside both, its filling included. Longer contexts than the model was trained for count too.

    Args:
        rows: Rows of the command.
        configs: Sizes of each decoder.
        kinds: The caches.
        limit: Bytes that a device allows.
        devices: Devices that share a cache; the rows give the bytes on one of them.
    """
    found = []
    for shape, config in configs.items():
        for kind in kinds:
            fields = {"shape": shape, **kind.as_dict()}
            measured = [row for row in rows if _is_decode(row) and fields.items() <= row.items()]
            if measured:
                most = max(measured, key=lambda row: row["cache_bytes"])
                tokens = min(REFERENCE_TOKENS, max(row["seq"] for row in measured))
                found.append(fields | _fit(most, _bytes_per_device(kind, config, devices), tokens, limit))
    return found


def _is_decode(row: Row) -> bool:
    return row["op"] == "model" and "us" in row


def _bytes_per_device(kind: Kind, config: DecoderConfig, devices: int) -> Callable[[int, int], float]:
    """Bytes of a cache on one device, as a function of the tokens and the number of sequences."""
    return lambda tokens, batch: kind.nbytes(config, tokens, batch) / devices


def _fit(row: Row, nbytes: Callable[[int, int], float], tokens: int, limit: int) -> dict[str, Any]:
    """What fits beside the weights and the overhead of a row."""
    room = limit - row["weights_bytes"] - row["overhead_bytes"]
    batch = largest(lambda count: nbytes(tokens, count) <= room)
    context = STEP_TOKENS * largest(lambda count: nbytes(STEP_TOKENS * count, 1) <= room, CEILING // STEP_TOKENS)
    names = ("weights_bytes", "overhead_bytes")
    sizes = {"limit_bytes": limit} | {name: row[name] for name in names} | {"room_bytes": room}
    return sizes | {"batch": batch, "batch_seq": tokens, "context": context, "computed": True}
