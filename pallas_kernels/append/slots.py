"""Where a token of a cache row lies: the only statement of this rule, for numpy, jnp and kernels alike.

The first tokens have sink slots of their own. Every later token enters a ring of the latest tokens: token s of those
behind the sinks takes slot sink_slots + s % ring. The token whose place it takes, s - ring, leaves for the pages:

    position   0 .. sink_slots-1 | sink_slots .. sink_slots+compressed-1 | sink_slots+compressed .. length-1
    lies in    sink slots        | pages, in order                       | ring

The tokens of the pages are counted from the first behind the sinks: their addresses. Address a is on the row's page
a // page_size. A row has room for its latest `pages_per_row` pages: page p lies at p % pages_per_row and, once its
first token comes, takes the whole place of page p - pages_per_row. In a row with room for all its pages nothing is ever
overwritten.
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


def first_page(compressed: Any, *, pages_per_row: int, page_size: int) -> Any:
    """The earliest page of a row that is still there once `compressed` tokens have left its ring.

    Args:
        compressed: int32, not negative.
        pages_per_row: Pages for which a row has room, at least 1.
        page_size: Tokens per page.

    Example:
        >>> first_page(np.array([0, 12, 13, 16, 17]), pages_per_row=3, page_size=4).tolist()
        [0, 0, 1, 1, 2]
    """
    pages = _quotient(compressed + (page_size - 1), page_size)
    return _numpy(pages).maximum(pages - pages_per_row, 0)


def page_at(page: Any, row: Any, *, pages_per_row: int) -> Any:
    """Where in the pools the page of a row lies.

    Example:
        >>> page_at(np.arange(3, 6), 2, pages_per_row=4).tolist()
        [11, 8, 9]
    """
    return row * pages_per_row + _remainder(page, pages_per_row)


def page_slot(address: Any, row: Any, compressed: Any, *, pages_per_row: int, page_size: int) -> tuple[Any, Any]:
    """The slot, page * page_size + place, of the token at an address of a row, and whether its page is still there.

    Args:
        address: int32, not negative and below `compressed` where the outcome is to mean something.
        row: int32, cache row.
        compressed: int32, tokens that have left the row's ring.
        pages_per_row: Pages for which a row has room, at least 1.
        page_size: Tokens per page.

    Example:
        >>> slot, there = page_slot(np.arange(3, 9), 1, 9, pages_per_row=2, page_size=4)
        >>> slot.tolist(), there.tolist()
        ([11, 12, 13, 14, 15, 8], [False, True, True, True, True, True])
    """
    slot = row * (pages_per_row * page_size) + _remainder(address, pages_per_row * page_size)
    return slot, address >= page_size * first_page(compressed, pages_per_row=pages_per_row, page_size=page_size)


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


def token_in_window(slot: Any, length: Any, begin: Any, stop: Any, *, first: int) -> tuple[Any, Any]:
    """The position of the token in a slot of a sequence's window, and whether there is one.

    A serving engine keeps blocks of a sequence in full precision: its first block in slots before the others, and all
    blocks from a token on.

    Args:
        slot: int32, from 0.
        length: int32, tokens of the sequence.
        begin: int32, tokens in the slots of the first block: all of them or none.
        stop: int32, position of the first token in the other slots.
        first: Slots of the first block; 0 if there are none.

    Example:
        >>> position, stored = token_in_window(np.arange(7), 10, 2, 6, first=2)
        >>> position.tolist(), stored.tolist()
        ([0, 1, 6, 7, 8, 9, 10], [True, True, True, True, True, True, False])
    """
    where, in_first = _numpy(slot).where, slot < first
    position = where(in_first, slot, slot - first + stop)
    return position, where(in_first, slot < begin, position < length)


def _numpy(x: Any) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def _quotient(x: Any, divisor: int) -> Any:
    """The quotient of a number that is not negative; C's, as is the remainder."""
    return lax.div(x, jnp.full_like(x, divisor)) if isinstance(x, jax.Array) else x // divisor


def _remainder(x: Any, divisor: int) -> Any:
    """The remainder of a number that is not negative; C's, which kernels compute in one instruction."""
    return lax.rem(x, jnp.full_like(x, divisor)) if isinstance(x, jax.Array) else x % divisor
