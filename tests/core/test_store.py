"""Caches and key statistics on disk, and caches of another size."""

import dataclasses
import json
import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import GROUP, KEY, PROD, VALUE, make_spec, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import tq_jax as tq
from tq_jax import files, store

pytest.importorskip("safetensors")
FORMATS = [
    (KEY, VALUE, "bfloat16"),
    (PROD, GROUP, "float32"),
    (tq.QuantizerSpec(32, 2.5), tq.QuantizerSpec(32, 8), "float16"),
]


def filled(lengths=(150, 3, 60), **options):
    k, v, q = tokens(len(lengths), 200)  # of one shape, so that few are compiled
    cache = tq.init_cache(make_spec(**options), batch=len(lengths))
    return tq.append(cache, k, v, query=q, lengths=jnp.asarray(lengths, jnp.int32))


def require_same(a, b):
    assert a.spec == b.spec
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.sampled
@pytest.mark.parametrize(("key", "value", "dtype"), FORMATS)
def test_a_cache_survives_and_goes_on(tmp_path, key, value, dtype):
    cache = filled(key=key, value=value, dtype=dtype)
    tq.save_cache(cache, tmp_path / "cache.safetensors")
    again = tq.load_cache(tmp_path / "cache.safetensors")
    require_same(cache, again)
    k, v, q = tokens(3, 40, seed=1)
    require_same(tq.append(cache, k, v, query=q), tq.append(again, k, v, query=q))
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(0, 200)] * 3))
def test_any_lengths(lengths):
    cache = filled(lengths)
    with tempfile.TemporaryDirectory() as folder:
        tq.save_cache(cache, f"{folder}/cache")
        require_same(cache, tq.load_cache(f"{folder}/cache"))


def test_a_file_ends_with_the_last_page_in_use(tmp_path):
    small, large = (filled((100, 0, 5), max_tokens=room) for room in (200, 20_000))
    for name, cache in (("small", small), ("large", large)):
        tq.save_cache(cache, tmp_path / name)
    sizes = [(tmp_path / name).stat().st_size for name in ("small", "large")]
    assert abs(sizes[0] - sizes[1]) < 64  # digits of the header
    again = tq.load_cache(tmp_path / "small", max_tokens=20_000)
    require_same(again, dataclasses.replace(large, spec=again.spec))


def test_full_precision_and_caches_without_pages(tmp_path):
    for cache in (
        tq.init_cache(tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=32, max_tokens=50), batch=2),
        tq.init_cache(make_spec(), batch=0),
        tq.init_cache(make_spec(window=0, sink_tokens=0), batch=1),
        filled((20, 0, 3), max_tokens=24),
    ):
        tq.save_cache(cache, tmp_path / "cache")
        require_same(cache, tq.load_cache(tmp_path / "cache"))


def test_outlier_channels_come_along(tmp_path):
    spec = make_spec(key=tq.QuantizerSpec(32, 2.5, scale="unbiased"))
    outliers = [1, 5, 8, 9, 20, 21, 22, 31]
    quantizer = tq.make_quantizer(spec.key, seed=3, outliers=outliers)
    cache = tq.init_cache(spec, batch=1, key_quantizer=quantizer)
    tq.save_cache(cache, tmp_path / "cache")
    require_same(cache, tq.load_cache(tmp_path / "cache"))


def test_damaged_files_are_refused(tmp_path):
    path, bad = tmp_path / "cache.safetensors", tmp_path / "bad.safetensors"
    tq.save_cache(filled(), path)
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[: len(whole) // 2], b"", b"\xff" * 100):
        bad.write_bytes(broken)
        with pytest.raises(ValueError, match="bad.safetensors: expected a safetensors file"):
            tq.load_cache(bad)
    for place in (len(whole) - 1, len(whole) - 20_000):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="expected contents of sha256 .* damaged"):
            tq.load_cache(bad)
    with pytest.raises(FileNotFoundError, match="no file"):
        tq.load_cache(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no folder"):
        tq.save_cache(filled(), tmp_path / "none" / "cache")
    with pytest.raises(IsADirectoryError, match="expected the path of a file, got the folder"):
        tq.save_cache(filled(), tmp_path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "tq-jax cache 0"}, "expected format 'tq-jax cache 1', got 'tq-jax cache 0'"),
        ({"rows": -1}, "expected at least 0 rows of 0 to 11 pages, got -1"),
        ({"rows": 4}, r"compressed: expected \('int32', \(4,\)\), got \('int32', \(3,\)\)"),
        ({"pages": 12}, "expected at least 0 rows of 0 to 11 pages, got 3 of 12"),
        ({"spec": None}, "expected a complete header"),
        ({"spec": {"window": -1}}, "expected window of at least 0, got -1"),
        ({"spec": {"colour": "red"}}, "expected a complete header"),
        ({"spec": {"value": {"dim": 32, "bits": 4}}}, "pages.values.packed: expected"),
        ({"spec": {"key": {"dim": 32, "bits": 7}}}, "got bits=7"),
    ],
)
def test_headers_that_lie(tmp_path, change, message):
    path = tmp_path / "cache"
    tq.save_cache(filled(), path)
    header, arrays = files.read_arrays(path, store.expected_cache)
    if isinstance(change.get("spec"), dict):
        change = {"spec": header["spec"] | change["spec"]}
    files.write_arrays(path, header | change, arrays)
    with pytest.raises(ValueError, match=message):
        tq.load_cache(path)


def test_counters_that_lie(tmp_path):
    path = tmp_path / "cache"
    tq.save_cache(filled(), path)
    header, arrays = files.read_arrays(path, store.expected_cache)
    files.write_arrays(path, header, arrays | {"length": np.asarray([150, 300, 60], np.int32)})
    with pytest.raises(ValueError, match="at most 200 tokens per row"):
        tq.load_cache(path)


def test_files_of_others(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected the header of a tq-jax file"):
        tq.load_cache(tmp_path / "other")
    save_file({"x": np.zeros(3)}, tmp_path / "other", {"tq_jax": json.dumps([1])})
    with pytest.raises(ValueError, match="expected the header of a tq-jax file"):
        files.read_header(tmp_path / "other")


def test_a_traced_cache_is_not_saved(tmp_path):
    cache = filled()
    with pytest.raises(ValueError, match="save it outside of jit"):
        jax.jit(lambda c: tq.save_cache(c, tmp_path / "cache"))(cache)


def test_statistics(tmp_path, unchecked_shapes):
    mean, weight = np.ones((3, 2, 32)), np.full((3, 2, 32), 2.0)
    tq.save_statistics(mean, weight, tmp_path / "keys")
    found = tq.load_statistics(tmp_path / "keys")
    assert [x.dtype for x in found] == [np.float32] * 2
    np.testing.assert_array_equal(found, [mean, weight])
    tq.init_cache(make_spec(), batch=1, statistics=tuple(jnp.asarray(x[1]) for x in found))
    for wrong in ((mean[0], weight[0]), (mean, weight[:2])):
        with pytest.raises(ValueError, match="expected mean and weight"):
            tq.save_statistics(*wrong, tmp_path / "wrong")
    for wrong in ((mean * np.nan, weight), (mean, 0 * weight), (mean, weight * np.inf)):
        with pytest.raises(
            ValueError, match="expected finite means and positive, finite weights of channels, got means"
        ):
            tq.save_statistics(*wrong, tmp_path / "wrong")
    tq.save_cache(filled(), tmp_path / "cache")
    with pytest.raises(ValueError, match="expected format 'tq-jax key statistics 1', got 'tq-jax cache 1'"):
        tq.load_statistics(tmp_path / "cache")
    assert not (tmp_path / "wrong").exists()


def test_specs_of_numpy_numbers_are_those_of_python(tmp_path):
    """What was made with numbers of arrays can be saved, and equals what was made with Python's own."""
    key = tq.QuantizerSpec(
        dim=np.int64(32),
        bits=np.float32(2.5),
        search=np.bool_(True),
        group=np.uint8(32),
        scale_dtype=np.dtype("float32"),
    )
    sizes = {"num_kv_heads": 2, "head_dim": 32, "max_tokens": 333, "window": 24, "sink_tokens": 3, "page_size": 16}
    flags = {"center_keys": True, "smooth_keys": False}
    made = tq.CacheSpec(
        **{name: np.int64(size) for name, size in sizes.items()},
        **{name: np.bool_(value) for name, value in flags.items()},
        key=key, value=VALUE, dtype=jnp.dtype("bfloat16"), sliding_window=np.asarray(200),
    )  # fmt: skip
    plain = tq.QuantizerSpec(dim=32, bits=2.5, search=True, scale_dtype="float32")
    assert made == tq.CacheSpec(**sizes, **flags, key=plain, value=VALUE, sliding_window=200)
    assert {type(value) for value in dataclasses.asdict(made).values()} <= {int, str, bool, dict}
    assert {type(value) for value in dataclasses.asdict(made.key).values()} <= {int, float, str, bool}
    cache = tq.append(tq.init_cache(made, batch=1), *(x[:1] for x in tokens(3, 40)[:2]))
    tq.save_cache(cache, tmp_path / "cache")
    assert tq.load_cache(tmp_path / "cache").spec == made


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for use in (lambda: tq.save_cache(filled(), tmp_path / "cache"), lambda: tq.load_cache(tmp_path / "cache")):
        with pytest.raises(ModuleNotFoundError, match="which the extra `models` of tq-jax installs"):
            use()


def test_sizes_of_numpy_numbers(tmp_path, unchecked_shapes):
    cache = tq.resize(filled(), np.int64(400))
    tq.save_cache(cache, tmp_path / "cache")
    assert tq.load_cache(tmp_path / "cache", max_tokens=np.int32(450)).spec == make_spec(max_tokens=450)


@pytest.mark.parametrize("name", ["max_tokens", "window", "sink_tokens", "page_size", "num_kv_heads", "sliding_window"])
def test_sizes_are_integers(name):
    for wrong in (64.0, np.float32(64), "64", [64], True):
        with pytest.raises(ValueError, match=f"expected {name} as an integer, got"):
            make_spec(**{name: wrong})


def test_files_are_as_readable_as_any_other_and_as_before(tmp_path):
    path, cache = tmp_path / "cache", filled()
    before = os.umask(0o027)
    try:
        tq.save_cache(cache, path)
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o664)
        tq.save_cache(cache, path)
        assert path.stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


@pytest.mark.slow
def test_another_size_changes_nothing_else():
    cache, query = filled(), tokens(3, 1, seed=2)[2]
    before = tq.attend(query, cache)
    for room in (400, 160):
        other = tq.resize(cache, room)
        assert other.spec == dataclasses.replace(cache.spec, max_tokens=room)
        shapes = jax.eval_shape(lambda spec=other.spec: tq.init_cache(spec, 3))
        assert jax.tree.map(lambda x: x.shape, other) == jax.tree.map(lambda x: x.shape, shapes)
        np.testing.assert_allclose(tq.attend(query, other), before, rtol=1e-5, atol=1e-6)  # other blocks of sums
    grown = jax.jit(lambda c: tq.resize(c, 400))(cache)
    require_same(grown, tq.resize(cache, 400))
    k, v, _ = tokens(3, 100, seed=3)
    want = tq.append(tq.append(tq.init_cache(grown.spec, 3), *tokens(3, 100)[:2]), k, v)
    found = tq.append(tq.resize(tq.append(tq.init_cache(cache.spec, 3), *tokens(3, 100)[:2]), 400), k, v)
    require_same(found, want)


def test_sizes_of_full_precision_and_between_pages_and_none():
    full = tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=32, max_tokens=50)
    grown = tq.resize(tq.append(tq.init_cache(full, 1), *tokens(1, 50)[:2]), 80)
    assert grown.spec == tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=32, max_tokens=80)
    k, v, _ = tokens(1, 20, seed=1)
    both = [jnp.concatenate(pair, axis=1) for pair in zip(tokens(1, 50)[:2], (k, v), strict=True)]
    require_same(tq.append(grown, k, v), tq.append(tq.init_cache(grown.spec, 1), *both))
    least = filled((20, 0, 3), max_tokens=28)
    assert least.pages is None
    require_same(tq.resize(tq.resize(least, 200), 28), least)


def test_sizes_that_do_not_fit():
    cache = filled()
    with pytest.raises(ValueError, match="expected at least max_tokens=150, the longest row, got 149"):
        tq.resize(cache, 149)
    with pytest.raises(ValueError, match="expected at least max_tokens=200 under jit, got 160"):
        jax.jit(lambda c: tq.resize(c, 160))(cache)
    for room, other in ((27, filled((20, 0, 3))), (200, filled((20, 0, 3), max_tokens=27))):
        with pytest.raises(ValueError, match="expected at least 28 tokens per row"):
            tq.resize(other, room)
