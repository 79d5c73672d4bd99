import json

import numpy as np
import pytest
import typer

from tq_jax.evaluate import search, search_data, search_methods

RECALL = {str(k): 0.5 for k in search_methods.DEPTHS}


def row(data, method, bits, recall, seconds=1.0):
    return {"data": data, "method": method, "bits": bits, "recall": {"1": recall}, "encode_cpu_seconds": seconds}


def rows(ours, pq, rabitq, seconds=20.0):
    found = []
    for bits in search.BITS:
        found += [row("a", "tq", bits, ours), row("a", "faiss PQ", bits, pq, seconds)]
        found += [row("a", "tq, bytes of RaBitQ", bits, ours), row("a", "faiss RaBitQ", bits, rabitq)]
    return found


@pytest.mark.parametrize(
    ("figures", "ok"),
    [
        ((0.8, 0.7, 0.8), [True, True, True]),
        ((0.7, 0.7, 0.8), [False, False, True]),
        ((0.8, 0.7, 0.8, 9.0), [True, True, False]),
    ],
)
def test_figures_decide(figures, ok):
    assert [claim.ok for claim in search.judge(rows(*figures))] == ok


def test_parts_of_product_quantization_keep_all_channels():
    x = np.arange(1, 11, dtype=np.float32).reshape(2, 5)
    assert search_methods.spread(x, 3).tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 0]]


def test_a_file_of_vectors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(2500, 16))
    np.save(tmp_path / "mine.npy", vectors)
    data = search_data.load(str(tmp_path / "mine.npy"))
    assert (data.name, data.base.shape, data.queries.shape) == ("mine", (1500, 16), (1000, 16))
    np.testing.assert_allclose(np.linalg.norm(data.base, axis=1), 1, rtol=1e-6)
    assert np.array_equal((data.queries @ data.base.T).argmax(1), data.nearest)
    np.save(tmp_path / "few.npy", vectors[:10])
    for name, message in ((str(tmp_path / "few.npy"), "with n of at least"), ("nothing", "expected one of glove-50")):
        with pytest.raises(ValueError, match=message):
            search_data.load(name)


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch):
    def fake(one, found):
        return [
            ({k: r[k] for k in ("data", "method", "bits")}, lambda r=r: FIGURES | {"recall": RECALL | r["recall"]})
            for r in rows(0.5, 0.6, 0.4)
        ]

    monkeypatch.setattr(search, "_plan", fake)
    monkeypatch.setattr(search, "environment", dict)
    monkeypatch.setattr(search, "load", lambda name: search_data.DataSet("a", *[np.zeros((1, 16))] * 3))
    target = tmp_path / "out.json"
    with pytest.raises(typer.Exit):
        search.search(json=str(target), data="a", plot=tmp_path / "out.png")
    written = json.loads(target.read_text())
    assert [claim["ok"] for claim in written["claims"]] == [False, True, False]
    assert len(written["rows"]) == 8
    assert (tmp_path / "out.png").stat().st_size > 1000


FIGURES = {
    "bytes": 54,
    "recall": RECALL,
    "encode_seconds": 1.0,
    "encode_cpu_seconds": 1.0,
    "queries_per_second": 1.0,
    "queries_per_cpu_second": 1.0,
}
