"""The Triton kernel, interpreted, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import LogitOptions, PagedArguments, TileConfig, decode_attention
from pallas_kernels.attention.decode.config import default_config, has_pairs, num_splits
from pallas_kernels.attention.decode.launch_triton import config_for
from pallas_kernels.pages import empty_pages
from tests.kernels.cases.pages import VARIANTS, Variant, make_case, relative_error, tolerance
from tq_jax import QuantizerSpec

PRECISE = {"group 16"}
QUICK = PRECISE | {
    "k4v4",
    "prod3 group2",
    "window",
    "k2v2",
    "k3v3",
    "k8v3",
    "k2.5v3.5",
    "prod1 v3",
    "d80",
    "d64 low",
    "window 1",
    "softcap bias",
    "group 16 k8",
    "group 16 uniform",
    "d80 3",
    "pages 16 window",
}
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]


run = functools.partial(jax.jit, static_argnames=("implementation", "config"))(decode_attention)


def attend(case, implementation, **config):
    query, pages, *_ = case.arrays
    base = config_for(query.shape, pages, case.options["key_format"], case.options["value_format"])
    config = dataclasses.replace(base, **({"programs": 64} | config))
    return run(case.arguments, implementation=implementation, config=config)


def log_sum_tolerance(variant, case):
    """Error of logits of keys of norm sqrt(dim) by rounding queries: 4 standard deviations if those have one byte."""
    query = case.arrays[0]
    if has_pairs(variant.count * variant.group, dim=variant.dim) or variant.key["bits"] == 8:
        return np.full(query.shape[:3], 5e-3 if variant.key.get("kind") == "prod" else 1e-3)
    return 4 * np.abs(np.asarray(query)).max(axis=3) / 127 / np.sqrt(12)


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_reference(name):
    case = make_case(VARIANTS[name])
    want = attend(case, "reference")
    got = attend(case, "triton")
    assert relative_error(got, want) <= tolerance(VARIANTS[name], want)
    np.testing.assert_array_equal(got.total > 0, want.total > 0)
    seen = np.asarray(want.total > 0)
    log_sum = np.asarray(want.peak + jnp.log(jnp.where(want.total > 0, want.total, 1.0)))
    error = np.abs(np.asarray(got.peak) - log_sum)
    assert np.all(error[seen] <= log_sum_tolerance(VARIANTS[name], case)[seen])
    np.testing.assert_array_equal(np.asarray(got.peak)[~seen], np.asarray(want.peak)[~seen])
    if name in PRECISE:
        assert relative_error(attend(case, "triton", precise=True), want) <= 1e-4


@pytest.mark.parametrize(
    "config",
    [{"tile": 32}, {"tile": 128, "num_warps": 2}, {"tile": 128, "programs": 1}, {"programs": 10_000}],
    ids=str,
)
def test_tiles_and_splits_do_not_matter(config):
    case = make_case(dataclasses.replace(VARIANTS["k4v4"], page_size=128, lengths=(257, 1, 0, 128)))
    want = attend(case, "reference")
    assert relative_error(attend(case, "triton", **config), want) <= 1e-4


def test_running_twice_gives_the_same_bits():
    case = make_case(VARIANTS["k3v3"])
    first, second = (attend(case, "triton") for _ in range(2))
    np.testing.assert_array_equal(first.acc, second.acc)
    np.testing.assert_array_equal(first.peak, second.peak)


def test_vectors_of_zeros_count_in_the_softmax():
    """A value scale of zero hides no probability."""
    case = make_case(VARIANTS["k4v4"])
    query, pages, *rest = case.arrays
    scale = pages.values.scale.at[..., ::2].multiply(0)
    pages = dataclasses.replace(pages, values=dataclasses.replace(pages.values, scale=scale))
    case = dataclasses.replace(case, arrays=(query, pages, *rest))
    assert relative_error(attend(case, "triton"), attend(case, "reference")) <= 1e-4


def test_large_logits_of_one_key():
    """Tiles whose largest probability is 2**-100 of the whole leave no trace, and no NaN."""
    case = make_case(Variant(lengths=(200, 129)))
    query, *rest = case.arrays
    options = case.options | {"options": LogitOptions(scale=8.0)}
    case = dataclasses.replace(case, arrays=(query, *rest), options=options)
    assert relative_error(attend(case, "triton"), attend(case, "reference")) <= 1e-2


def test_limits_are_named():
    def call(key=None, value=None, *, dim=64, heads=2, count=1, page=64, config=None):
        key, value = key or QuantizerSpec(dim, 4), value or QuantizerSpec(dim, 4)
        pages = empty_pages(2, 1, page, key.format, value.format)
        arguments = PagedArguments(
            jnp.zeros((1, count, heads, dim)), pages, jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32),
            positions=jnp.zeros((1, count), jnp.int32), key_format=key.format, value_format=value.format,
            options=LogitOptions(1.0),
        )  # fmt: skip
        return decode_attention(arguments, implementation="triton", config=config)

    for match, arguments in [
        ("head dims .*, got 48 and 48", {"dim": 48}),
        ("up to 8 query tokens and 16 query heads per KV head, got 9 and 2", {"count": 9}),
        ("got 1 and 17", {"heads": 17}),
        ("pages of a multiple of 16 tokens .*, got page_size=24", {"page": 24}),
        ("that divide 128 or are a multiple of it, got page_size=192", {"page": 192, "config": TileConfig(tile=128)}),
        (r"codes of \(1, 2, 3, 4, 8\) bits, got bits=5", {"key": QuantizerSpec(64, 5)}),
        (
            "up to 2 warps for more than 8 query columns, got 4 for 16",
            {"heads": 8, "config": TileConfig(64, num_warps=4)},
        ),
        ("keys of codebook formats, got GroupFormat", {"key": QuantizerSpec(64, 4, kind="group")}),
        ("values without a sketch", {"value": QuantizerSpec(64, 4, kind="prod")}),
    ]:
        with pytest.raises(NotImplementedError, match=match):
            call(**arguments)
    with pytest.raises(ValueError, match="expected tile in .*, got tile=48"):
        TileConfig(tile=48)
    assert num_splits(TileConfig(programs=1584), batch=8, kv_heads=8, capacity=32768) == 24
    assert num_splits(TileConfig(), batch=1, kv_heads=8, capacity=64) == 1


def test_tiles_of_devices():
    """With 16 columns tiles are halved where registers spilled; with 8 columns all devices have the same tiles."""
    shapes = (8, 128), (16, 128), (16, 64)
    tiles = {
        c: [default_config(128, columns=n, dim=d, capability=c).tile for n, d in shapes] for c in (80, 90, 100, 120)
    }
    assert tiles == {80: [128, 128, 128], 90: [128, 128, 128], 100: [128, 64, 128], 120: [128, 128, 128]}
    tiles = [default_config(128, value_parts=4, capability=c).tile for c in (80, 90, 100)]
    assert tiles == [64, 128, 64]
    stages = [default_config(128, value_parts=4, sketched=s).num_stages for s in (False, True)]
    assert stages == [3, 2]
    assert [default_config(64, columns=n).tile for n in (8, 16)] == [128, 64]  # a tile of several pages
    stages = {c: [default_config(128, bits=(n, n), capability=c).num_stages for n in (3, 4)] for c in (90, 100, 120)}
    assert stages == {90: [3, 3], 100: [2, 3], 120: [2, 3]}
