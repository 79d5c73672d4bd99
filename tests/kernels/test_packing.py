import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.packing import pack, packed_bytes, plane_widths, unpack

# Bytes of 16 channels whose codes are (7 i + 3) mod 2**bits.
GOLDEN = {
    1: "ff00",
    2: "ffaa5500",
    3: "ffaa5500cccc",
    4: "b32a91087fe65dc4",
    5: "b32a91087fe65dc4566a",
    7: "b32a91087fe65dc47448899de0f0",
    8: "030a11181f262d343b424950575e656c",
}


def by_hand(codes: np.ndarray, bits: int) -> bytes:
    """The layout of the module's docstring, one channel at a time."""
    out, shift = bytearray(), 0
    for width in plane_widths(bits):
        size = -(-len(codes) * width // 8)
        plane = bytearray(size)
        for channel, code in enumerate(codes):
            plane[channel % size] |= ((int(code) >> shift) & ((1 << width) - 1)) << (width * (channel // size))
        out += plane
        shift += width
    return bytes(out)


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_bytes(bits):
    codes = ((7 * np.arange(16) + 3) % 2**bits).astype(np.uint8)
    assert np.asarray(pack(jnp.asarray(codes), bits)).tobytes().hex() == GOLDEN[bits]
    assert by_hand(codes, bits).hex() == GOLDEN[bits]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)  # the first call of a shape compiles
@given(bits=st.integers(1, 8), dim=st.sampled_from([1, 7, 16, 17, 80, 128]), data=st.data())
def test_round_trip_along_any_axis(bits, dim, data):
    codes = data.draw(hnp.arrays(np.uint8, (2, dim), elements=st.integers(0, 2**bits - 1)))
    packed = pack(jnp.asarray(codes), bits)
    assert packed.shape == (2, packed_bytes(dim, bits))
    assert [row.tobytes() for row in np.asarray(packed)] == [by_hand(row, bits) for row in codes]
    np.testing.assert_array_equal(unpack(packed, bits, dim), codes)
    np.testing.assert_array_equal(unpack(packed.T, bits, dim, axis=-2), codes.T)


def test_true_sizes():
    assert [packed_bytes(128, bits) for bits in (0, 1, 2, 3, 4, 5, 7, 8)] == [0, 16, 32, 48, 64, 80, 112, 128]
    assert packed_bytes(80, 3) == 30
    assert packed_bytes(17, 3) == 5 + 3


def test_errors():
    with pytest.raises(NotImplementedError, match="0 to 8 bits are supported, got bits=9"):
        pack(jnp.zeros((4,), jnp.uint8), 9)
    with pytest.raises(ValueError, match="expected 48 bytes for dim=128, bits=3; got an axis of 64"):
        unpack(jnp.zeros((64,), jnp.uint8), 3, 128)
