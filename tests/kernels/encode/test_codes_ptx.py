"""The PTX of the encode kernels, emulated, against thresholds and the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest

from pallas_kernels.encode import channel_quads_triton as channel_quads
from pallas_kernels.encode import codes_by_comparison_triton as by_comparison
from pallas_kernels.encode import codes_by_table_ptx as table_ptx
from pallas_kernels.encode import codes_by_table_triton as by_table
from pallas_kernels.encode import encode_pages, kernel_triton, launch_triton, reference
from pallas_kernels.encode.codes_by_comparison_ptx import LARGEST_CELL
from pallas_kernels.lookup import integers
from pallas_kernels.numerics import UNSIGNED_ANCHOR
from pallas_kernels.tiles import intrinsics_triton
from pallas_kernels.tiles.pool_ref import pool_refs
from tests.kernels.cases.encode import CASES, Case, compare, make_arrays
from tq_jax.codebook import codebook

MODULES = (intrinsics_triton, channel_quads, by_comparison, by_table)
TABLES = (2, 3, 4)
ALL = (1, 2, 3, 4, 5, 8)
DIMS = (64, 128)
SMALL = np.float32(table_ptx.SMALL)


def every_codebook(test):
    """Runs a test of emulated PTX for every width and head dim."""
    for mark in (
        pytest.mark.parametrize("bits", ALL),
        pytest.mark.parametrize("dim", DIMS),
        pytest.mark.usefixtures("emulated"),
    ):
        test = mark(test)
    return test


WIDTH = 16


@pytest.fixture
def emulated(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "run", ptx.run)


def normal(dim, count=40, seed=0):
    """Vectors and their steps per unit."""
    y = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return y, lambda book: (1 / (np.linalg.norm(y, axis=1) * book.step)).astype(np.float32)


def extremes(book, dim):
    """Steps at, just below and just above every threshold and cell, and zeros of both signs, tiny and large ones."""
    thresholds = np.arange(1, 128) if book.bits == 8 else book.thresholds
    at = np.concatenate([np.asarray(thresholds, np.float32), np.arange(1, 2 / book.step).astype(np.float32) / 2])
    tiny = np.array([0, 1e-45, 1e-40, 1.2e-38, 1e-20, 1e-6], np.float32)
    large = np.array([1 / book.step, 127.5, 127.99999, 128], np.float32)
    s = np.concatenate([at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(np.inf)), tiny, large])
    s = np.concatenate([s, -s])
    return np.resize(np.random.default_rng(1).permutation(s), (-(-len(s) // dim), dim))


def quads(y):
    return channel_quads.quads([jnp.asarray(y[:, i : i + WIDTH]) for i in range(0, y.shape[1], WIDTH)])


def channels(codes):
    """Codes of quads as one code per channel, [rows, dim]."""
    return np.concatenate([np.asarray(code) >> (8 * i) & 0xFF for i in range(4) for code in codes], axis=1)


def nearest(s, book):
    """Index and level, by thresholds, of exact magnitudes; a magnitude at a threshold goes up."""
    if book.bits == 8:
        index = np.floor(np.minimum(s, LARGEST_CELL)).astype(np.int64)
        return index, index + 0.5
    index = np.searchsorted(np.asarray(book.thresholds), s, side="right")
    return index, np.asarray(book.levels)[index] + 0.5


def signed(index, negative, book):
    return index ^ np.where(negative, 255 if book.bits == 8 else 1 << (book.bits - 1), 0)


def words(book, count):
    return [jnp.full(count, int(word), jnp.int32) for word in table_ptx.tables(book)]


def by_both(y, unit, book, *, searching=False):
    """Codes, <s, q> and <q, q> by each kind of code that takes the codebook."""
    unit = np.broadcast_to(np.asarray(unit, np.float32), len(y))
    found = [by_comparison.codes(quads(y), jnp.asarray(unit), book, searching=searching, interpret=False)]
    if table_ptx.cell_offset(book) is not None:
        codes, along, squared = by_table.codes(quads(y), jnp.asarray(unit * SMALL), words(book, len(y)), book)
        found.append((codes, along if searching else along * unit, squared))
    return [(channels(codes), np.asarray(along), np.asarray(squared)) for codes, along, squared in found]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", TABLES)
def test_tables_find_the_levels(dim, bits):
    """The tables in numpy, for every cell."""
    book = codebook(dim, bits)
    cell = np.arange(400)
    carry, odd, high, low, index = table_ptx.tables(book).view(np.uint8).reshape(len(table_ptx.TABLES), 8)
    shifted = np.minimum(cell + table_ptx.cell_offset(book), 255)
    carried = shifted + carry[shifted >> 5]
    assert carried.max() < 256
    want = np.searchsorted(np.asarray(book.thresholds), cell / 2, side="right")
    np.testing.assert_array_equal(index[carried >> 5], want)
    np.testing.assert_array_equal(odd[carried >> 5], 2 * np.asarray(book.levels)[want] + 1)
    centroid = (high.astype(np.uint32) << 24 | low.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(centroid[carried >> 5], np.asarray(book.levels)[want] + 0.5)


def test_tables_have_limits():
    """Runs of cells with several thresholds, and codebooks without a threshold."""
    assert [table_ptx.cell_offset(codebook(128, bits)) for bits in (1, 5, 8)] == [None] * 3


@every_codebook
def test_codes_of_every_threshold_and_its_neighbours(bits, dim):
    book = codebook(dim, bits)
    y = extremes(book, dim)
    index, _ = nearest(np.abs(y), book)
    found = by_both(y, 1, book)
    assert len(found) == (2 if bits in TABLES else 1)
    for codes, *_ in found:
        np.testing.assert_array_equal(codes, signed(index, np.signbit(y), book))


@every_codebook
def test_a_magnitude_at_a_threshold_goes_up_here_and_down_in_the_reference(bits, dim):
    """Elsewhere the reference has the same levels; 8 bits have no thresholds but floors, which agree."""
    book = codebook(dim, bits)
    y = extremes(book, dim)
    want = np.asarray(reference._nearest(jnp.abs(y), book)[0]).astype(np.int64)
    tied = np.isin(np.abs(y), np.asarray(book.thresholds, np.float32)) & (bits < 8)
    assert tied.any() == (1 < bits < 8)
    for codes, *_ in by_both(np.abs(y), 1, book):
        np.testing.assert_array_equal(codes, want + tied)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bits", ALL)
def test_a_negative_zero_is_negative_here_and_positive_in_the_reference(bits):
    """Both levels are equally near; sums of rotations, and kernels without one, give no negative zero."""
    book, y = codebook(64, bits), np.full((1, 64), -0.0, np.float32)
    for codes, *_ in by_both(y, 1, book):
        assert (codes == signed(0, True, book)).all()
    assert (np.asarray(reference.quantize_segment(jnp.asarray(y), book, scale="norm", search=False)[0]) == 0).all()


@every_codebook
def test_codes_of_random_vectors_are_those_of_the_reference(bits, dim):
    book = codebook(dim, bits)
    y, unit = normal(dim)
    want = np.asarray(reference.quantize_segment(jnp.asarray(y), book, scale="norm", search=False)[0])
    s = np.abs(y) * unit(book)[:, None]
    thresholds = np.arange(1, 128) if bits == 8 else np.asarray([*book.thresholds, np.inf])
    clear = np.min(np.abs(s[..., None] / thresholds - 1), axis=-1) > 1e-6
    assert clear.mean() > 0.999
    for codes, *_ in by_both(y, unit(book), book):
        np.testing.assert_array_equal(codes[clear], want[clear])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("searching", [False, True])
@pytest.mark.parametrize("bits", ALL)
def test_sums_beside_codes(bits, searching):
    """<q, q> is exact; <s, q> (<|y|, q> when searching) is rounded at each of 128 sums at most."""
    book = codebook(128, bits)
    y, unit = normal(128)
    scaled = np.abs(y) * unit(book)[:, None]
    _, level = nearest(scaled, book)
    along = np.sum((np.abs(y) if searching else scaled).astype(np.float64) * level, axis=1)
    for _, found, squared in by_both(y, unit(book), book, searching=searching):
        np.testing.assert_array_equal(squared, np.sum(level * level, axis=1).astype(np.float32))
        np.testing.assert_allclose(found, along, rtol=2e-6)
    parts, factor = quads(y), jnp.asarray(unit(book))
    alone = by_comparison.sums(parts, factor, book, searching=searching, interpret=False)
    beside = by_comparison.codes(parts, factor, book, searching=searching, interpret=False)[1:]
    jax.tree.map(np.testing.assert_array_equal, alone, beside)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", TABLES)
def test_sums_of_a_search_by_tables(bits, dim):
    """Magnitudes are rounded to integers; products with inverse multiples are not rounded before levels are found."""
    book = codebook(dim, bits)
    y, unit = normal(dim)
    steps = (np.abs(y) * (unit(book) * SMALL)[:, None]).astype(np.float64) / SMALL
    signed_steps = channel_quads.scaled(quads(y), jnp.asarray(unit(book) * SMALL))
    cut = [by_table.cut(quad, book) for quad in signed_steps]
    integer = sum(channels([quad[i] for quad in cut]).astype(np.int64) << (8 * i) for i in range(3))
    fine = 2.0 ** table_ptx.fraction_bits(book)
    np.testing.assert_array_equal(integer, np.rint(steps * fine))
    for inverse in reference.INVERSE_MULTIPLES[[0, 7, 20, 33, 40]]:
        factor = jnp.full(len(y), inverse, jnp.float32)
        _, level = nearest(steps * np.float64(inverse), book)
        along, squared = by_table.sums(signed_steps, cut, factor, words(book, len(y)), book)
        np.testing.assert_allclose(along, np.sum(integer * 2 * level, axis=1), rtol=2e-7)
        np.testing.assert_array_equal(squared, np.sum(4 * level * level, axis=1))
        bound = by_comparison.sums(signed_steps, factor / SMALL, book, searching=True, interpret=False)
        np.testing.assert_allclose(np.asarray(along) / (2 * fine), np.asarray(bound[0]) / SMALL, rtol=1e-5)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bits", ALL)
def test_vectors_that_are_not_finite_have_sums_that_are_not(bits):
    book, y = codebook(64, bits), normal(64, 3)[0]
    y[0, 5], y[1, 7], y[2, 9] = np.nan, np.inf, -np.inf
    for _, along, squared in by_both(y, 1, book):
        assert not np.isfinite(along).any()
        assert np.isfinite(squared).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_of_codes(bits):
    """Levels by the codes, signs by the vectors, which residuals are made of."""
    book = codebook(128, bits)
    y, unit = normal(128)
    codes = by_comparison.codes(quads(y), jnp.asarray(unit(book)), book, searching=False, interpret=False)[0]
    one = jnp.ones(len(y))
    rest = by_comparison.residuals(quads(y), one, codes, one, book, interpret=False)
    level = np.asarray(integers(jnp.asarray(channels(codes), jnp.uint8), book)) + np.float32(0.5)
    np.testing.assert_array_equal(np.concatenate(channel_quads.tiles(rest), axis=1), y - level)


@pytest.mark.usefixtures("emulated")
def test_squares():
    y, _ = normal(128)
    found = channel_quads.squares(quads(y), interpret=False)
    np.testing.assert_allclose(found, np.sum(y.astype(np.float64) ** 2, axis=1), rtol=1e-6)


@pytest.mark.usefixtures("emulated")
def test_counting_and_rounding_down_for_tiles_that_are_no_quads():
    for bits in (1, 2, 3, 4, 5):
        book = codebook(64, bits)
        magnitude = jnp.abs(extremes(book, 64))
        weights = [float(gap + 256) for gap in np.diff(book.levels)]
        options = [intrinsics_triton.above(magnitude, book.thresholds, weights, interpret=i) for i in (False, True)]
        np.testing.assert_array_equal(*options)
    x = jnp.minimum(jnp.abs(extremes(codebook(64, 8), 64)), LARGEST_CELL)
    np.testing.assert_array_equal(intrinsics_triton.floor(x, interpret=False), np.floor(x) + UNSIGNED_ANCHOR)


@pytest.mark.parametrize("bits", ALL)
@pytest.mark.usefixtures("emulated")
def test_codes_do_not_depend_on_interpretation(bits):
    book = codebook(128, bits)
    y, unit = normal(128)
    found = [
        by_comparison.codes(quads(y), jnp.asarray(unit(book)), book, searching=False, interpret=interpret)
        for interpret in (False, True)
    ]
    np.testing.assert_array_equal(*(channels(codes) for codes, *_ in found))


EMULATED = {
    "k4v4 search": CASES["k4v4 search"],
    "one token a program": dataclasses.replace(CASES["decode step, search"], lead=(5, 1)),
    "k3v2": Case({"bits": 3}, {"bits": 2}, dim=64, lead=(1, 20)),
    "prod4 search": CASES["prod4 search"],
    "k5v3 haar": Case({"bits": 5, "rotation": "haar"}, {"bits": 3, "rotation": "haar"}, dim=64, lead=(1, 20)),
    "k2.5v8": Case({"bits": 2.5}, {"bits": 8}, dim=64, lead=(1, 20)),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", EMULATED)
def test_the_kernel_with_its_ptx_against_the_reference(name, monkeypatch):
    """The kernel as it is compiled, with tables and all, except that JAX interprets what is not PTX."""

    def encode_tiles(x, as_inputs, pools, *, plans):
        compiled = tuple(dataclasses.replace(plan, interpret=False) for plan in plans)
        kernel_triton.encode_tiles(x, as_inputs, pools, plans=compiled)

    for module in MODULES:
        monkeypatch.setattr(module, "run", ptx.run_traced)
    monkeypatch.setattr(launch_triton, "encode_tiles", encode_tiles)
    # JAX does the stores, whatever the plan says.
    monkeypatch.setattr(
        kernel_triton, "pool_refs", lambda refs, shapes, interpret: pool_refs(refs, shapes, interpret=True)
    )
    arrays = make_arrays(EMULATED[name], heads=1)

    def run(implementation):
        options = dict(**arrays.options, implementation=implementation)
        return jax.jit(lambda *x: encode_pages(*x, **options))(arrays.keys, arrays.values, arrays.pages, arrays.slots)

    found = compare(arrays, run("triton"), run("reference"))
    assert not found.wrong
    few = max(2, 1e-4 * found.values)
    assert (found.ties <= few, found.searched <= few, found.scales <= 2) == (True, True, True)
