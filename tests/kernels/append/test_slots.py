"""The rule of places in the full-precision slots, in numpy and jnp, against a ring that is filled token by token."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.append.slots import left, slot_of, stays, token_in_slot

SIZES = {"sink_slots": st.integers(0, 4), "ring": st.integers(0, 7), "length": st.integers(0, 40)}


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


@given(**SIZES, more=st.integers(0, 20))
def test_what_stays_is_what_has_not_left(sink_slots, ring, length, more):
    position = np.arange(length + more, dtype=np.int32)
    kept = stays(position, length + more, sink_slots=sink_slots, ring=ring)
    packed = max(left(length + more, sink_slots=sink_slots, ring=ring), 0)
    np.testing.assert_array_equal(~kept, (position >= sink_slots) & (position < sink_slots + packed))
    same = slot_of(jnp.asarray(position), sink_slots=sink_slots, ring=ring)
    np.testing.assert_array_equal(same, slot_of(position, sink_slots=sink_slots, ring=ring))
