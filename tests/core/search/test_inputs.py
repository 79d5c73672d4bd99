"""What may be searched for and in: no vectors, any magnitudes, numbers and arrays of other libraries, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vectors import DIM, PUBLISHED, spec

from tq_jax import search as nearest


@pytest.mark.parametrize("metric", ["inner_product", "cosine", "l2"])
def test_no_queries(data, metric):
    index = nearest.build(data[0][:50], spec(metric=metric, kind="prod", **PUBLISHED))
    for search in (nearest.search, jax.jit(nearest.search, static_argnums=2)):
        scores, ids = search(index, data[1][:0], 3)
        assert scores.shape == ids.shape == (0, 3)
        assert (scores.dtype, ids.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("options", [{"metric": "l2"}, {"metric": "l2", "center": False}, {"metric": "cosine"}])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_scores_are_ones_that_the_metric_can_have(data, options, precision):
    x = data[0]
    index = nearest.build(x, spec(bits=8, **options))
    scores, ids = nearest.search(index, np.concatenate([x[:300], 7 * x[:9]]), 5, precision=precision)
    least, most = (-1, 1) if options["metric"] == "cosine" else (-np.inf, 0)
    assert least <= np.min(scores) and np.max(scores) <= most
    assert np.all(np.diff(scores) <= 0) and (np.asarray(ids)[:300, 0] == np.arange(300)).mean() > 0.99
    assert np.all(np.asarray(nearest.search(index, x[:2], 4000)[0])[:, 3000:] == -np.inf)


@pytest.mark.parametrize("metric", ["inner_product", "cosine", "l2"])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_magnitudes_of_float32(data, metric, size):
    """Vectors and queries far from 1 find what they find near it, if their scores have an order in float32."""
    x, queries = data[0][:300].astype(np.float64), data[1][:20].astype(np.float64)
    index, scaled = (nearest.build((x * f).astype(np.float32), spec(metric=metric, bits=6)) for f in (1, size))
    wanted, alike = (nearest.search(i, (queries * f).astype(np.float32), 2) for i, f in ((index, 1), (scaled, size)))
    assert (np.asarray(alike[1]) == np.asarray(wanted[1])).mean() > 0.95
    degree = {"inner_product": 2, "cosine": 0, "l2": 2}[metric]
    limits = np.finfo(np.float32)
    expected = np.clip(np.asarray(wanted[0], np.float64) * size**degree, limits.min, limits.max)
    tolerance = 2e-2 * np.abs(expected[:, :1]) + 2e-2 * np.abs(np.asarray(wanted[0], np.float64)).max() * size**degree
    assert np.all(np.abs(np.asarray(alike[0], np.float64) - expected) <= np.maximum(tolerance, 1e-37))
    if metric == "inner_product":  # queries of any length have the same neighbours
        factor = {1e30: 1e-35}.get(size, 1e12)
        ids = nearest.search(scaled, (queries * factor).astype(np.float32), 2)[1]
        assert (np.asarray(ids) == np.asarray(wanted[1])).mean() > 0.95


def test_norms_outside_float32_are_refused(data):
    x = np.clip(data[0][:99], -1, 1).astype(np.float64)
    for size, message in (
        (1e-42, r"norms from 1.18e-38 to 3.4e\+38, the range of float32, got"),
        (3e38, r"got \d|inf"),
    ):
        for center in (True, False):
            with pytest.raises(ValueError, match=message):
                nearest.build((x * size).astype(np.float32), spec(metric="l2", center=center))


def test_lists_and_tensors(data, unchecked_shapes):
    torch = pytest.importorskip("torch")
    x, queries = data[0][:60], data[1][:4]
    wanted = nearest.search(nearest.build(x, spec()), queries, 3)
    for make in (torch.tensor, np.ndarray.tolist, lambda vectors: tuple(vectors), jnp.asarray):
        index = nearest.add(nearest.build(make(x[:40]), spec()), make(x[40:]))
        assert int(index.count) == 60
        found = nearest.search(nearest.build(make(x), spec()), make(queries), 3)
        np.testing.assert_array_equal(found[1], wanted[1])
    for wrong in (torch.tensor(x).bfloat16(), torch.tensor(x, requires_grad=True), [[1.0], [1.0, 2.0]]):
        with pytest.raises(
            ValueError, match="expected queries as an array of JAX or NumPy, or one that NumPy can read"
        ):
            nearest.search(index, wrong, 3)
    for wrong in ("text", None, [[1] * DIM]):
        with pytest.raises(ValueError, match="expected"):
            nearest.search(index, wrong, 3)


def test_numbers_of_numpy(data, tmp_path, unchecked_shapes):
    x, queries = data
    whole = nearest.IndexSpec(
        dim=np.int64(DIM), bits=np.float32(3.5), center=np.bool_(True), step_search=np.bool_(False)
    )
    assert whole == spec(bits=3.5, step_search=False)
    index = nearest.add(nearest.train(x, whole, capacity=np.int64(9), seed=np.uint8(3)), x[:100])
    nearest.save(index, tmp_path / "index")
    assert nearest.load(tmp_path / "index").spec == whole
    for k in (np.int32(3), np.asarray(3), jnp.asarray(3)):
        assert nearest.search(index, queries[:2], k, tile=np.int64(64))[0].shape == (2, 3)
    for wrong in ({"k": 3.0}, {"k": 3, "tile": 64.0}):
        with pytest.raises(ValueError, match="expected (k|tile) as an integer, got"):
            nearest.search(index, queries[:2], **wrong)


@pytest.mark.sampled
@pytest.mark.parametrize("metric", ["inner_product", "cosine", "l2"])
def test_derivatives_along_a_direction_and_no_gradient(data, metric):
    index, queries = nearest.build(data[0][:300], spec(metric=metric)), jnp.asarray(data[1][:3])

    def scores(queries):
        return nearest.search(index, queries, 2)[0]

    step = jnp.full_like(queries, 1e-2)
    _, along = jax.jvp(scores, (queries,), (step,))
    np.testing.assert_allclose(along, (scores(queries + step) - scores(queries - step)) / 2, rtol=0.05, atol=1e-3)
    for wrapped in (scores, jax.jit(scores)):
        with pytest.raises(NotImplementedError, match=r"search: derivatives .* are supported, got a gradient"):
            jax.grad(lambda queries, f=wrapped: f(queries).sum())(queries)
