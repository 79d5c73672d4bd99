"""The PTX of the lookups, emulated, against packing and the plain lookup."""

import jax.numpy as jnp
import numpy as np
import pytest
from ptx import emulate

from pallas_kernels.format import GroupFormat
from pallas_kernels.lookup import integers
from pallas_kernels.packing import pack
from pallas_kernels.tiles import int8_triton as lt
from pallas_kernels.tiles.layout import cut, key_parts, planes_of, value_parts
from tq_jax import QuantizerSpec
from tq_jax.codebook import codebook


def words(array):
    return [int(w) for w in np.ascontiguousarray(array, np.uint8).view("<u4")]


def int8s(word):
    return np.array([word], "<u4").view(np.int8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_ptx_of_plain_and_mixed_tiles(bits, dim):
    book = codebook(dim, bits)
    codes = np.random.default_rng(bits).integers(0, 2**bits, dim).astype(np.uint8)
    want = np.asarray(integers(jnp.asarray(codes), book))
    packed = np.asarray(pack(jnp.asarray(codes), bits))
    part = key_parts(QuantizerSpec(dim, bits).format)[0]
    mixed = 0
    for tile in part.tiles:
        channel = np.arange(tile.valid // 4 * 4)
        start = np.full_like(channel, tile.start)
        if tile.partner is not None:
            partner, place = (np.asarray(x) for x in lt.mixed_index(jnp.asarray(channel)))
            start, channel, mixed = np.where(partner, tile.partner, tile.start), place + 2 * tile.half, mixed + 1
        wanted = want[start + channel]
        planes = []
        for width, first, size, _ in planes_of(part, tile):
            place = tile.start + np.arange(len(channel))
            planes.append((width, packed[first + place % size], place // size - tile.start // size))
        fields = [field for *_, field in planes_of(part, tile)]
        ptx = lt.lookup_ptx(book, fields, None if tile.partner is None else tile.half)
        for i in range(0, len(channel), 4):
            registers = {}
            for p, (width, data, shift) in enumerate(planes):
                if len(set(shift[i : i + 4])) > 1:
                    data = data >> (shift * width)
                    shift = np.zeros_like(shift)
                registers[f"p{p}"] = words(data[i : i + 4])[0] >> int(shift[i]) * width
            np.testing.assert_array_equal(int8s(emulate(ptx, **registers)), wanted[i : i + 4])
    assert mixed == (0 if bits == 1 or not part.words else len(part.tiles))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_ptx_of_four_elements_of_different_fields(width):
    """Triton chooses the layout of tiles: the four elements of a thread need not be neighbours."""
    rng = np.random.default_rng(width)
    for last in range(1, 8 // width):
        plane = lt.Field(data=None, width=width, field=0, shift=None, last=last)
        data, shift = rng.integers(0, 256, 4).astype(np.uint8), rng.integers(0, last + 1, 4)
        ptx = lt.shift_ptx(plane, "$0", "$1", "$2")
        got = np.array(emulate(ptx, **{"$1": words(data)[0], "$2": words(shift)[0]}), "<u4").reshape(1).view(np.uint8)
        kept = 8 - last * width
        np.testing.assert_array_equal(got % 2**kept, (data >> (shift * width)) % 2**kept)


@pytest.mark.parametrize("width", [2, 4])
def test_ptx_of_group_codes(width):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 4).astype(np.uint8)
    for field in range(8 // width):
        got = int8s(emulate(lt.integer_ptx(width, field), p0=words(data)[0]))
        want = ((data >> (width * field)) & (2**width - 1)).astype(np.int64) - 2 ** (width - 1)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_tiles_cover_every_channel_once(dim, bits):
    for least in (16, 32):
        channels = [c for tile in cut(dim, bits, least=least) for c in range(tile.start, tile.start + tile.valid)]
        assert channels == list(range(dim))
    parts = value_parts(GroupFormat(dim, 4, 16))
    assert [c for p in parts for t in p.tiles for c in range(t.start, t.start + t.valid)] == list(range(dim))
