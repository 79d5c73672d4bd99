"""Blocks: pages that lie apart give what dense pools give, by the reference and by kernels; gaps stay as they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.decode import launch_triton as decode
from pallas_kernels.attention.prefill import launch_triton as prefill
from pallas_kernels.attention.reference import attend_pages
from pallas_kernels.blocks import ALIGNMENT, BlockLayout, Blocks, PageRows
from pallas_kernels.encode.arguments import EncodeArguments
from pallas_kernels.encode.launch_triton import encode_pages
from pallas_kernels.pages import read_pages
from tests.kernels.cases.encode import CASES, make_arrays
from tests.kernels.cases.pages import VARIANTS, make_case, normalized

GAP = 48
"""Bytes behind each page."""


def layout_of(pages, key, value):
    return BlockLayout(pages.kv_heads, pages.page_size, key, value)


def in_blocks(pages, layout, *, gap=GAP, start=0):
    """The bytes of dense pools as blocks; all other bytes are 0xFF, NaN as scales."""
    stride = start + layout.page_bytes + gap
    memory = np.full((pages.count, stride), 0xFF, np.uint8)
    for pool, place in zip(jax.tree.leaves(pages), jax.tree.leaves(layout.places), strict=True):
        first = start + place.start
        content = np.ascontiguousarray(np.asarray(pool)).reshape(pages.count, -1).view(np.uint8)
        memory[:, first : first + place.size] = content
    return memory


def rows_of(memory, layout):
    """What a kernel sees at the address of each array; behind the memory nothing exists, here garbage."""
    count = len(memory)

    def read(place):
        flat = np.concatenate([memory.reshape(-1)[place.start :], np.full(place.start, 0xFF, np.uint8)])
        return jnp.asarray(flat.view(place.dtype).reshape(count, -1))

    places = layout.places
    return PageRows(*jax.tree.map(read, (places.keys, places.values)), layout)


@pytest.mark.parametrize("name", ["k4v4", "k2.5v3.5", "prod3 group2", "pages 16", "pages 256 float32"])
def test_blocks_hold_the_pages(name):
    """Every array at its place, wherever in the block the page starts; gathered alone, dense pools give the same."""
    arguments = make_case(VARIANTS[name]).arguments
    pages, ids = arguments.pages, arguments.block_table
    layout = layout_of(pages, arguments.key_format, arguments.value_format)
    assert all(place.start % ALIGNMENT == 0 for place in jax.tree.leaves(layout.places))
    assert layout.page_bytes == sum(pool.nbytes for pool in jax.tree.leaves(pages)) // pages.count
    want = jax.tree.leaves(read_pages(pages, ids))
    memory = in_blocks(pages, layout, start=32)
    blocks = Blocks(jnp.asarray(memory), jnp.int32(32), layout)
    for found in (read_pages(blocks, ids), read_pages(rows_of(in_blocks(pages, layout), layout), ids)):
        for x, y in zip(jax.tree.leaves(found), want, strict=True):
            np.testing.assert_array_equal(x.view(jnp.uint8), y.view(jnp.uint8))


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["k4v4", "prod3 group2", "pages 16 window"])
def test_decode_reads_blocks(name):
    case = make_case(VARIANTS[name])
    arguments = case.arguments
    layout = layout_of(arguments.pages, arguments.key_format, arguments.value_format)
    rows = rows_of(in_blocks(arguments.pages, layout), layout)
    attend = jax.jit(functools.partial(decode.attend_pages, interpret=True))
    want, found = attend(arguments), attend(dataclasses.replace(arguments, pages=rows))
    assert np.isfinite(normalized(want)).all()
    np.testing.assert_array_equal(normalized(found), normalized(want))


def test_the_reference_reads_blocks():
    arguments = make_case(VARIANTS["k4v4"]).arguments
    layout = layout_of(arguments.pages, arguments.key_format, arguments.value_format)
    blocks = Blocks(jnp.asarray(in_blocks(arguments.pages, layout, start=16)), jnp.int32(16), layout)
    want, found = (jax.jit(attend_pages)(dataclasses.replace(arguments, pages=x)) for x in (arguments.pages, blocks))
    np.testing.assert_array_equal(normalized(found), normalized(want))


def test_prefill_reads_blocks():
    arguments = make_case(dataclasses.replace(VARIANTS["k4v4"], count=20, lengths=(200, 64))).arguments
    layout = layout_of(arguments.pages, arguments.key_format, arguments.value_format)
    rows = rows_of(in_blocks(arguments.pages, layout), layout)
    attend = jax.jit(functools.partial(prefill.attend_pages, interpret=True))
    want, found = attend(arguments), attend(dataclasses.replace(arguments, pages=rows))
    assert np.isfinite(normalized(want)).all()
    np.testing.assert_array_equal(normalized(found), normalized(want))


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["k4v4", "prod3 group2"])
def test_encode_writes_blocks(name):
    """The codes of dense pools, and not a byte of anything else."""
    x = make_arrays(CASES[name], heads=1)
    tokens = EncodeArguments(x.keys, x.values, x.slots, **x.options)
    layout = layout_of(x.pages, tokens.key.format, tokens.value.format)
    rows = rows_of(in_blocks(x.pages, layout), layout)
    encode = jax.jit(functools.partial(encode_pages, interpret=True))
    want, found = encode(tokens, x.pages), encode(tokens, rows)
    for new, old, dense in zip(*(jax.tree.leaves(pages) for pages in (found, rows, want)), strict=True):
        size = dense[0].size
        np.testing.assert_array_equal(new[:, :size].view(jnp.uint8), dense.reshape(len(dense), -1).view(jnp.uint8))
        np.testing.assert_array_equal(new[:, size:].view(jnp.uint8), old[:, size:].view(jnp.uint8))


@pytest.mark.parametrize(("stride", "start"), [(4336, 0), (4360, 0), (4352, 8)])
def test_blocks_without_room_are_refused(stride, start):
    four = make_case(VARIANTS["d64"]).arguments.key_format
    with pytest.raises(ValueError, match="expected blocks of at least 4352 bytes, a multiple of 16 bytes apart"):
        BlockLayout(2, 32, four, four).require_room(stride, start)
