import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vectors import DIM, PUBLISHED, spec

from tq_jax import search as nearest
from tq_jax.search import select
from tq_jax.search.codes import pack_runs, unpack_runs
from tq_jax.search.index import _encode
from tq_jax.search.query import _search
from tq_jax.search.spec import books, widths_bytes


def exact(x, queries, metric):
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    if metric == "l2":
        return -((queries[:, None] - x[None]) ** 2).sum(-1)
    return queries @ x.T


def recall(x, queries, spec, k=4):
    ids = np.asarray(nearest.search(nearest.build(x, spec), queries, k)[1])
    return (ids == exact(x, queries, spec.metric).argmax(1)[:, None]).any(1).mean()


@pytest.mark.parametrize(
    ("metric", "basis", "floor"), [("inner_product", "pca", 0.97), ("l2", "pca", 0.97), ("cosine", "random", 0.93)]
)
def test_recall_against_exact_search(data, metric, basis, floor):
    assert recall(*data, spec(metric=metric, basis=basis)) >= floor


@pytest.mark.slow
def test_what_is_free_at_query_time_pays(data):
    published, improved = (recall(*data, spec(metric="cosine", **options), k=1) for options in (PUBLISHED, {}))
    prod = recall(*data, spec(metric="cosine", kind="prod", **PUBLISHED), k=1)
    assert prod < published - 0.05 < improved - 0.15


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("metric", "bits"), [("cosine", 1), ("inner_product", 2.5), ("l2", 3), ("inner_product", 6), ("l2", 8)]
)
def test_scores_estimate_the_metric(data, metric, bits):
    x, queries = data
    scores, ids = nearest.search(nearest.build(x[:500], spec(bits=bits, metric=metric)), queries, k=500)
    wanted = np.take_along_axis(exact(x[:500], queries, metric), np.asarray(ids), 1)
    error = np.std(np.asarray(scores) - wanted) / np.std(wanted)
    assert error < 1.2 * 2.0**-bits
    assert np.array_equal(np.sort(ids, axis=1), np.tile(np.arange(500), (200, 1)))


def test_one_bit_of_prod_is_all_sketch(data, tmp_path):
    """No code has a bit: scores are signs of the sketch times the norm, unbiased."""
    x, queries = data
    index = nearest.build(x[:500], spec(bits=1, kind="prod", **PUBLISHED))
    assert index.bytes_per_vector == index.spec.budget == DIM // 8 + 4
    scores, ids = nearest.search(index, queries, k=500)
    wanted = np.take_along_axis(exact(x[:500], queries, "inner_product"), np.asarray(ids), 1)
    size = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(x[:500], axis=1)[np.asarray(ids)]
    assert np.std((np.asarray(scores) - wanted) / size) == pytest.approx((np.pi / 2 / DIM) ** 0.5, rel=0.2)
    nearest.save(index, tmp_path / "index")
    assert np.array_equal(nearest.search(nearest.load(tmp_path / "index"), queries, k=500)[1], ids)


def test_a_vector_finds_itself_exactly(data):
    """The unbiased scale makes the estimate of |x - m|^2 exact up to the rounding of stored scalars."""
    x = data[0][:100]
    scores, ids = nearest.search(nearest.build(x, spec(bits=2, metric="l2")), x, k=1)
    assert ids[:, 0].tolist() == list(range(100))
    assert np.abs(np.asarray(scores[:, 0])).max() < 2e-3 * np.sum(x * x, axis=1).max()


def test_pieces_equal_the_whole(data):
    x, queries = data
    whole, pieces = nearest.build(x, spec()), nearest.train(x, spec())
    for start, stop in ((0, 1), (1, 700), (700, 2500), (2500, 2500), (2500, 3000)):
        pieces = nearest.add(pieces, x[start:stop])
    for a, b in zip(
        jax.tree.leaves((whole.code, whole.offset)), jax.tree.leaves((pieces.code, pieces.offset)), strict=True
    ):
        assert np.array_equal(a[:3000], b[:3000])
    assert int(pieces.count) == 3000
    found = nearest.search(whole, queries, 5), nearest.search(pieces, queries, 5)
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("tile", [100, 10**6])
def test_tiles_change_nothing(data, tile):
    x, queries = data
    index = nearest.build(x, spec())
    wanted, found = nearest.search(index, queries[:9], 20), nearest.search(index, queries[:9], 20, tile=tile)
    assert np.array_equal(wanted[1], found[1])
    np.testing.assert_allclose(wanted[0], found[0], rtol=1e-5)


def test_ties_go_to_the_smaller_id(data):
    x, queries = data
    index = nearest.build(np.repeat(x[:10], 300, axis=0), spec())
    ids = np.asarray(nearest.search(index, queries[:5], 300, tile=512)[1])
    assert np.array_equal(ids, ids[:, :1] + np.arange(300))
    assert np.array_equal(ids[:, 0] % 300, np.zeros(5))


@pytest.fixture
def usual_compiler():
    """Lets XLA optimize as it does for users: without that, programs of other shapes may round in other ways."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    _search.clear_cache()
    yield
    _search.clear_cache()
    jax.config.update(name, before)


@pytest.mark.sampled
@pytest.mark.usefixtures("usual_compiler")
@pytest.mark.parametrize("options", [{}, {"metric": "l2", "bits": 2.5}, PUBLISHED, {"kind": "prod"} | PUBLISHED])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_groups_change_no_bit(data, monkeypatch, options, precision):
    x, queries = data
    index = nearest.build(np.concatenate([x, x[::-1], np.zeros_like(x[:200])]), spec(**options))
    assert select.group_size(4096, 9) == 16
    grouped = nearest.search(index, queries, 9, precision=precision, tile=4096)
    monkeypatch.setattr(select, "group_size", lambda count, k: 1)
    _search.clear_cache()
    for found, wanted in zip(grouped, nearest.search(index, queries, 9, precision=precision, tile=4096), strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("count", [1, 7, 64, 96, 999, 1000, 2048, 16384])
def test_groups_find_what_top_k_finds(count):
    rng = np.random.default_rng(count)
    ids = jnp.arange(count, dtype=jnp.int32)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def run(scores, k):
        kept = jnp.full((6, k), -jnp.inf), jnp.full((6, k), -1, jnp.int32)
        narrowed, their_ids = select.narrow(lambda parts: parts[0], (scores, ids), k)
        best = jax.lax.top_k(jnp.concatenate([kept[0], scores], axis=1), k)
        return best, select.keep(kept, narrowed, their_ids), narrowed

    for k in (1, 2, 10, 47, 300, 3000):
        for values in ([0, 1], [-2, -1, 3, -np.inf], [-np.inf], rng.normal(size=10 * count)):
            scores = rng.choice(np.asarray(values, np.float32), size=(6, count))
            (top, places), found, narrowed = run(jnp.asarray(scores), k)
            assert np.array_equal(found[0], top)
            assert np.array_equal(found[1], np.maximum(places - k, -1))
            assert narrowed.shape[1] == count or 2 * narrowed.shape[1] <= count


def test_many_queries_in_turns(data):
    x, queries = data
    index = nearest.build(x, spec())
    many = np.tile(queries, (6, 1))
    assert np.array_equal(nearest.search(index, many, 3)[1], np.tile(nearest.search(index, queries, 3)[1], (6, 1)))


def test_float16_operands_find_the_same(data):
    x, queries = data
    index = nearest.build(1e4 * x, spec(metric="l2"))
    full, half = (nearest.search(index, 1e4 * queries, 1, precision=p) for p in ("float32", "float16"))
    assert (np.asarray(full[1]) == np.asarray(half[1])).mean() > 0.97
    np.testing.assert_allclose(full[0], half[0], rtol=0.01, atol=1e8)


def test_64_bit_jax(data):
    x, queries = data
    want = nearest.search(nearest.build(x[:500], spec(metric="l2")), queries, 3)
    with jax.enable_x64(True):
        index = nearest.build(jnp.asarray(x[:500], jnp.float64), spec(metric="l2"))
        found = nearest.search(index, jnp.asarray(queries, jnp.float64), 3)
    assert [part.dtype for part in found] == [np.float32, np.int32]
    np.testing.assert_array_equal(found[1], want[1])


def test_fewer_vectors_than_k_and_none(data):
    x, queries = data
    empty = nearest.train(x, spec())
    scores, ids = nearest.search(empty, queries[:2], 3)
    assert np.all(np.asarray(scores) == -np.inf) and np.all(np.asarray(ids) == -1)
    scores, ids = nearest.search(nearest.add(empty, x[:2]), queries[:2], 4000)
    assert np.array_equal(np.sort(ids, axis=1)[:, -3:], [[-1, 0, 1]] * 2)
    assert np.all(np.isfinite(scores[:, :2])) and np.all(np.asarray(scores[:, 2:]) == -np.inf)


def test_searches_and_adds_do_not_retrace(data):
    x, queries = data
    index = nearest.train(x, spec(bits=3), capacity=3000)
    traces = []
    for start in (0, 500, 900):
        index = nearest.add(index, x[start : start + 400])
        nearest.search(index, queries, 2)
        traces.append((_encode._cache_size(), _search._cache_size()))
    assert traces[0] == traces[1] == traces[2]


def test_add_and_search_under_jit(data):
    x, queries = data
    empty = nearest.train(x, spec(), capacity=2048)
    step, compiled = jax.jit(nearest.add, donate_argnums=0), jax.jit(nearest.search, static_argnums=2)
    index = step(jax.tree.map(jnp.copy, empty), x[:1000])
    assert np.array_equal(compiled(index, queries, 3)[1], nearest.search(nearest.add(empty, x[:1000]), queries, 3)[1])
    full = step(step(index, x[1000:2000]), x[2000:3000])  # the last have no room: unchanged
    assert int(full.count) == 2000
    poison = np.full((1000, DIM), np.nan, np.float32)
    bad = step(empty, poison)
    assert int(bad.count) == 1000 and np.all(np.asarray(compiled(bad, queries, 3)[1]) == -1)
    assert np.all(np.asarray(compiled(full, poison[:200], 3)[1]) == -1)


def test_more_vectors_than_capacity_under_jit_change_nothing(data):
    index = nearest.train(data[0], spec(), capacity=2048)
    assert int(jax.jit(nearest.add)(index, data[0]).count) == 0


@pytest.mark.parametrize("options", [{}, {"metric": "l2", "bits": 2.5}, {"kind": "prod"} | PUBLISHED])
def test_save_and_load(data, tmp_path, options):
    x, queries = data
    index = nearest.build(x, spec(**options))
    nearest.save(index, tmp_path / "index.safetensors")
    loaded = nearest.load(tmp_path / "index.safetensors")
    assert loaded.spec == index.spec and loaded.widths == index.widths
    for a, b in zip(nearest.search(index, queries, 5), nearest.search(loaded, queries, 5), strict=True):
        assert np.array_equal(a, b)
    more = nearest.add(loaded, x[:10])
    assert int(more.count) == 3010
    assert [path.name for path in tmp_path.iterdir()] == ["index.safetensors"]


def test_damaged_files_are_refused(data, tmp_path):
    from safetensors.numpy import load_file, save_file

    path, bad = tmp_path / "index.safetensors", tmp_path / "bad.safetensors"
    nearest.save(nearest.build(data[0], spec()), path)
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[: len(whole) // 2], b"", b"\xff" * 100):
        bad.write_bytes(broken)
        with pytest.raises(ValueError, match="expected a safetensors file"):
            nearest.load(bad)
    arrays = load_file(path)
    save_file(arrays, bad)
    with pytest.raises(ValueError, match="expected the header of a tq-jax file"):
        nearest.load(bad)
    start = 8 + int.from_bytes(whole[:8], "little")
    header = whole[8:start].decode()
    for name, value, message in (
        ("index 2", "index 1", "expected format"),
        ('\\"dim\\": 48', '\\"dim\\": 64', "cover 64 channels"),
        ('\\"metric\\": \\"inner_product\\"', '\\"metric\\": \\"manhattan____\\"', "expected metric"),
        ("packed", "racked", "packed: expected"),
    ):
        assert name in header
        bad.write_bytes(whole[:8] + header.replace(name, value).encode() + whole[start:])
        with pytest.raises(ValueError, match=message):
            nearest.load(bad)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    for name, array, message in (
        ("packed", arrays["packed"][:, :-1], "packed: expected"),
        ("scale", arrays["scale"][:-1], "scale: expected"),
        ("mean", arrays["mean"].astype(np.float64), "mean: expected"),
        ("rotation", np.full_like(arrays["rotation"], np.nan), "the file is damaged"),
        ("packed", arrays["packed"] ^ (np.arange(arrays["packed"].shape[1]) == 3), "the file is damaged"),
    ):
        save_file(arrays | {name: np.ascontiguousarray(array)}, bad, metadata)
        with pytest.raises(ValueError, match=message):
            nearest.load(bad)
    with pytest.raises(FileNotFoundError):
        nearest.load(tmp_path / "none")


def test_wrong_arguments_are_refused(data, unchecked_shapes):
    x, queries = data
    index = nearest.build(x, spec())
    calls = (
        lambda vectors: nearest.add(index, vectors),
        lambda vectors: nearest.search(index, vectors, 1),
        lambda vectors: nearest.build(vectors, spec()),
    )
    for call in calls:
        for wrong in (x[:, :-1], x[0], x.astype(np.int32)):
            with pytest.raises(ValueError, match="expected"):
                call(wrong)
        for poison in (np.nan, np.inf):
            spoiled = x[:3].copy()
            spoiled[1, 5] = poison
            with pytest.raises(ValueError, match="NaN"):
                call(spoiled)
    with pytest.raises(ValueError, match="expected queries that are finite in float32, got NaN"):
        nearest.search(index, x[:3].astype(np.float64) * 1e300, 1)
    with pytest.raises(ValueError, match="65504"):
        nearest.add(index, x[:3] * 1e9)
    with pytest.raises(ValueError, match="at least one vector"):
        nearest.build(x[:0], spec())
    for options in ({"seed": -1}, {"capacity": -1}):
        with pytest.raises(ValueError, match="at least 0"):
            nearest.train(x, spec(), **options)
    for options in ({"k": 0}, {"k": 1, "tile": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            nearest.search(index, queries, **options)
    with pytest.raises(ValueError, match="expected precision"):
        nearest.search(index, queries, 1, precision="int8")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"metric": "hamming"}, ValueError),
        ({"basis": "haar"}, ValueError),
        ({"kind": "group"}, ValueError),
        ({"scale": "matched"}, ValueError),
        ({"scale": "norm"}, ValueError),
        ({"kind": "prod"}, ValueError),
        ({"dim": 48.0}, ValueError),
        ({"bits": "4"}, ValueError),
        ({"center": 1}, ValueError),
        ({"dim": 8}, NotImplementedError),
        ({"bits": 0.5}, NotImplementedError),
        ({"bits": 9}, NotImplementedError),
        ({"bits": 2.5, "basis": "random"}, NotImplementedError),
    ],
)
def test_specs_that_do_not_exist(options, error):
    with pytest.raises(error):
        spec(**options)


def test_bytes(data):
    for bits in (1, 2, 2.5, 3, 4, 6, 8):
        index = nearest.train(data[0], spec(bits=bits))
        # Nearly all of the budget is used, and none of it twice.
        assert index.spec.budget - 1 <= index.bytes_per_vector <= index.spec.budget
        arrays = jax.tree.leaves((index.code, index.offset))
        assert sum(a.nbytes for a in arrays) == index.bytes_per_vector * index.capacity
    assert nearest.train(data[0], spec(**PUBLISHED)).bytes_per_vector == DIM * 4 // 8 + 2
    for dim, bits, options in ((17, 3, {"basis": "random"}), (44, 4, {"kind": "prod"} | PUBLISHED)):
        index = nearest.train(data[0][:, :dim], spec(dim=dim, bits=bits, **options))
        assert index.bytes_per_vector == index.spec.budget  # planes and signs end with whole bytes


def test_constant_data_and_zeros():
    x = np.ones((50, DIM), np.float32)
    for options in ({}, {"metric": "l2", "basis": "random"}):
        scores, ids = nearest.search(nearest.build(x, spec(**options)), x[:1], 3)
        assert ids.tolist() == [[0, 1, 2]]
        assert np.isfinite(scores).all()
    zeros = nearest.build(np.zeros((5, DIM), np.float32), spec(metric="cosine"))
    assert nearest.search(zeros, x[:1], 2)[1].tolist() == [[0, 1]]


def test_runs_pack_without_loss():
    widths = ((5, 7), (3, 6), (11, 5), (9, 3), (4, 0), (13, 2), (3, 1), (2, 8))
    rng = np.random.default_rng(0)
    codes = [jnp.asarray(rng.integers(2**bits, size=(4, count)), jnp.uint8) for count, bits in widths]
    packed = jax.jit(lambda c: pack_runs(c, widths))(codes)
    assert packed.shape == (4, widths_bytes(widths))
    unpack = jax.jit(lambda p, axis: unpack_runs(p, widths, axis=axis), static_argnums=1)
    unpacked = zip(unpack(packed, -1), unpack(packed.T, -2), strict=True)
    for (_, bits), before, (after, transposed) in zip(widths, codes, unpacked, strict=True):
        assert np.array_equal(before, after), bits
        assert np.array_equal(before, transposed.T), bits
    assert [book.bits for book in books(widths, 50)] == [bits for _, bits in widths]
