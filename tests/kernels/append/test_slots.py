"""The rule of places in the full-precision slots, in numpy and jnp, against a ring that is filled token by token."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.append.slots import first_page, left, page_at, page_slot, slot_of, stays, token_in_slot

SIZES = {"sink_slots": st.integers(0, 4), "ring": st.integers(0, 7), "length": st.integers(0, 40)}


@settings(deadline=None)
@given(**SIZES)
def test_slots_hold_what_entered_them_last(sink_slots, ring, length):
    held = np.full(sink_slots + ring, -1)
    for position in range(length):
        if position < sink_slots or ring:
            held[slot_of(np.int32(position), sink_slots=sink_slots, ring=ring)] = position
    compressed = max(left(length, sink_slots=sink_slots, ring=ring), 0)
    slot = np.arange(sink_slots + ring, dtype=np.int32)
    for numpy in (np, jnp):
        position, stored = token_in_slot(
            numpy.asarray(slot), numpy.int32(length), numpy.int32(compressed),
            sink_slots=sink_slots, slots=sink_slots + ring,
        )  # fmt: skip
        np.testing.assert_array_equal(np.where(stored, position, -1), held)


@pytest.mark.slow
@settings(deadline=None)
@given(**SIZES, more=st.integers(0, 20))
def test_what_stays_is_what_has_not_left(sink_slots, ring, length, more):
    position = np.arange(length + more, dtype=np.int32)
    kept = stays(position, length + more, sink_slots=sink_slots, ring=ring)
    packed = max(left(length + more, sink_slots=sink_slots, ring=ring), 0)
    np.testing.assert_array_equal(~kept, (position >= sink_slots) & (position < sink_slots + packed))
    same = slot_of(jnp.asarray(position), sink_slots=sink_slots, ring=ring)
    np.testing.assert_array_equal(same, slot_of(position, sink_slots=sink_slots, ring=ring))


@settings(deadline=None)
@given(
    row=st.integers(0, 3),
    pages_per_row=st.integers(1, 5),
    page_size=st.integers(1, 6),
    chunks=st.lists(st.integers(0, 40), max_size=6),
)
def test_pages_hold_the_latest_pages(row, pages_per_row, page_size, chunks):
    """Against a row of pages that is written chunk by chunk."""
    sizes = dict(pages_per_row=pages_per_row, page_size=page_size)
    held, packed = np.full(4 * pages_per_row * page_size, -1), 0
    for count in chunks:
        address = np.arange(packed, packed + count, dtype=np.int32)
        packed += count
        slot, there = page_slot(address, row, packed, **sizes)
        same = page_slot(jnp.asarray(address), jnp.int32(row), jnp.int32(packed), **sizes)
        np.testing.assert_array_equal(slot, same[0])
        np.testing.assert_array_equal(there, same[1])
        assert len(set(slot[there].tolist())) == there.sum()  # no two tokens of a call race for a slot
        held[slot[there]] = address[there]
    first = int(first_page(np.int32(packed), **sizes))
    assert int(first_page(jnp.int32(packed), **sizes)) == first
    pages = page_at(np.arange(first, first + pages_per_row), row, pages_per_row=pages_per_row)
    assert sorted(pages.tolist()) == list(range(row * pages_per_row, (row + 1) * pages_per_row))
    read = held.reshape(-1, page_size)[pages].reshape(-1)[: packed - first * page_size]
    np.testing.assert_array_equal(read, np.arange(first * page_size, packed))
    assert packed == 0 or packed - first * page_size >= min(packed, (pages_per_row - 1) * page_size + 1)
