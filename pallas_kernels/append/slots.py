"""Where a token of a cache row lies: the only statement of this rule, for numpy, jnp and kernels alike.

The first tokens have sink slots of their own. Every later token enters a ring of the latest tokens: token s of those
behind the sinks takes slot sink_slots + s % ring. The token whose place it takes, s - ring, leaves for the pages:

    position   0 .. sink_slots-1 | sink_slots .. sink_slots+compressed-1 | sink_slots+compressed .. length-1
    lies in    sink slots        | pages, in order                       | ring
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def slot_of(position: Any, *, sink_slots: int, ring: int) -> Any:
    """The full-precision slot that the token at a position takes.

    Args:
        position: int32, from 0, numpy or jnp.
        sink_slots: Slots of the first tokens.
        ring: Slots of the latest tokens.

    Example:
        >>> slot_of(np.arange(7), sink_slots=2, ring=3).tolist()
        [0, 1, 2, 3, 4, 2, 3]
    """
    behind = _remainder(position - sink_slots, max(ring, 1))
    return _numpy(position).where(position < sink_slots, position, sink_slots + behind)


def stays(position: Any, after: Any, *, sink_slots: int, ring: int) -> Any:
    """Whether the token at a position is in a full-precision slot once the row has `after` tokens."""
    return (position < sink_slots) | (position >= after - ring)


def left(after: Any, *, sink_slots: int, ring: int) -> Any:
    """Tokens that have left the ring for the pages once a row has `after` tokens; negative while the ring has room."""
    return after - sink_slots - ring


def token_in_slot(slot: Any, length: Any, compressed: Any, *, sink_slots: int, slots: int) -> tuple[Any, Any]:
    """The position of the token in a slot, and whether there is one.

    Args:
        slot: int32, from 0; slots at or beyond `slots` hold no token.
        length: int32, tokens of the row.
        compressed: int32, tokens of the row in pages: after a crop, slots may lack tokens that pages hold.
        sink_slots: Slots of the first tokens.
        slots: Slots of both kinds.

    Example:
        >>> position, stored = token_in_slot(np.arange(5), 6, 1, sink_slots=2, slots=5)
        >>> position.tolist(), stored.tolist()
        ([0, 1, 5, 3, 4], [True, True, True, True, True])
    """
    in_sinks = slot < sink_slots
    if slots == sink_slots:
        return slot, in_sinks & (slot < length)
    ring = slots - sink_slots
    latest = length - sink_slots - 1
    address = latest - _remainder(latest - (slot - sink_slots) + ring, ring)
    in_ring = (slot < slots) & (latest >= 0) & (address >= compressed)
    where = _numpy(slot).where
    return where(in_sinks, slot, sink_slots + address), where(in_sinks, slot < length, in_ring)


def _numpy(x: Any) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def _remainder(x: Any, divisor: int) -> Any:
    """The remainder of a number that is not negative; C's, which kernels compute in one instruction."""
    return lax.rem(x, jnp.full_like(x, divisor)) if isinstance(x, jax.Array) else x % divisor
