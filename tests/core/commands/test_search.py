import json
import sys

import numpy as np
import pytest
import typer

from tq_jax.commands.search import command as search
from tq_jax.commands.search import data, methods

RECALL = {str(k): 0.5 for k in methods.DEPTHS}


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


def test_product_quantization_without_vectors_to_train_on_is_not_compared():
    found = [r | ({"enough_to_train": False} if r["method"] == "faiss PQ" else {}) for r in rows(0.5, 0.9, 0.5)]
    assert [claim.name.split(",")[0] for claim in search.judge(found)] == [
        "share with recall 1@1 at least that of faiss RaBitQ at its bytes",
        "PQ training and encoding over ours",
    ]
    others = [r | {"data": "b"} for r in rows(0.8, 0.7, 0.8)]
    above = search.judge(found + others)[0]
    assert (above.figure, sorted(above.details)) == (1.0, ["b, 2 bits", "b, 4 bits"])


def test_few_vectors_are_no_noise(capfd):
    pytest.importorskip("faiss")
    x = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    base, queries = x[:280], x[280:]
    few = data.DataSet("few", base, queries, np.argmax(queries @ base.T, axis=1))
    assert methods.faiss_pq(few, 8)["enough_to_train"] is False
    assert "WARNING" not in "".join(capfd.readouterr())


def test_the_least_clock_counts(monkeypatch):
    clocks = iter([(5, 2.0), (6, 1.0), (7, 4.0), (8, 9.0)])
    monkeypatch.setattr(methods, "timed", lambda work: (work(), methods.Clock(*next(clocks))))
    assert methods.quickest(lambda: "found") == ("found", methods.Clock(6, 1.0))
    assert methods.quickest(lambda: "long") == ("long", methods.Clock(8, 9.0))


def test_parts_of_product_quantization_keep_all_channels():
    x = np.arange(1, 11, dtype=np.float32).reshape(2, 5)
    assert methods.spread(x, 3).tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 0]]


def test_a_file_of_vectors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(2500, 16))
    np.save(tmp_path / "mine.npy", vectors)
    mine = data.load(str(tmp_path / "mine.npy"))
    assert (mine.name, mine.base.shape, mine.queries.shape) == ("mine", (1500, 16), (1000, 16))
    np.testing.assert_allclose(np.linalg.norm(mine.base, axis=1), 1, rtol=1e-6)
    assert np.array_equal((mine.queries @ mine.base.T).argmax(1), mine.nearest)
    np.save(tmp_path / "few.npy", vectors[:10])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nothing", "expected one of glove-50, wordllama-200, tokens-576 or a .npy file, got 'nothing'"),
        ("", "expected one of glove-50"),
        ("{0}", "expected one of glove-50"),
        ("{0}/good.npy,nothing", "expected one of glove-50"),
        ("{0}/good.npy,{0}/good.npy", "expected data sets of different names"),
        ("{0}/text.npy", "text.npy: expected a .npy file, got a damaged file or another format"),
        ("{0}/cut.npy", "cut.npy: expected a .npy file, got a damaged file or another format"),
        ("{0}/zipped.npz", "zipped.npz: expected a .npy file"),
        ("{0}/objects.npy", "objects.npy: expected a .npy file"),
        ("{0}/few.npy", "with n of at least 2000, got float64"),
        ("{0}/whole.npy", "expected float vectors .* got int64"),
        ("{0}/nan.npy", "expected finite vectors, got inf or nan"),
        ("{0}/thin.npy", "dim from 16 to 4096 is supported, got dim=4"),
    ],
)
def test_what_is_no_data_set_is_refused(names, message, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "one_thread", lambda: None)
    vectors = np.random.default_rng(0).normal(size=(2000, 16))
    arrays = {"good": vectors, "few": vectors[:10], "whole": vectors.astype(np.int64), "thin": vectors[:, :4]}
    arrays |= {"nan": np.where(vectors > 3, np.nan, vectors), "objects": np.array([None])}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "zipped.npz", vectors)
    (tmp_path / "text.npy").write_text("no vectors")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-100])
    with pytest.raises(typer.BadParameter, match=message):
        search.search(data=names.format(tmp_path))


def test_faiss_is_needed_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(search, "load", lambda name: pytest.fail("loaded"))
    with pytest.raises(typer.BadParameter, match=r'faiss.*pip install -e "\.\[search\]" in a checkout'):
        search.search()


@pytest.fixture
def few_rows(monkeypatch):
    """The command with figures made up for one data set; the list is of what was measured."""
    measured = []

    def measure(r):
        measured.append(r)
        return FIGURES | {"recall": RECALL | r["recall"]}

    def plan(one, found):
        made = rows(0.5, 0.6, 0.4)
        return [({k: r[k] for k in ("data", "method", "bits")}, lambda r=r: measure(r)) for r in made]

    monkeypatch.setattr(search, "_plan", plan)
    monkeypatch.setattr(search, "environment", lambda: {"commit": "abc", "versions": {}})
    monkeypatch.setattr(search, "load_all", lambda names: [data.DataSet("a", *[np.zeros((1, 16))] * 3)])
    return measured


def test_the_command_writes_what_it_measured(tmp_path, few_rows):
    target = tmp_path / "out.json"
    with pytest.raises(typer.Exit):
        search.search(json=str(target), data="a", plot=tmp_path / "out.png")
    written = json.loads(target.read_text())
    assert [claim["ok"] for claim in written["claims"]] == [False, True, False]
    assert len(written["rows"]) == 8
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_run_that_was_cut_off_goes_on(tmp_path, few_rows):
    target = tmp_path / "out.json"
    with pytest.raises(typer.Exit):
        search.search(json=str(target), data="a")
    whole = json.loads(target.read_text())
    assert few_rows == rows(0.5, 0.6, 0.4)
    few_rows.clear()
    kept = [dict(row, bytes=1) for row in whole["rows"][:3]]
    target.write_text(json.dumps({k: v for k, v in whole.items() if k != "claims"} | {"rows": kept}))
    with pytest.raises(typer.Exit):
        search.search(json=str(target), data="a", resume=True)
    assert few_rows == rows(0.5, 0.6, 0.4)[3:]
    assert json.loads(target.read_text()) == whole | {"rows": kept + whole["rows"][3:]}
    target.write_text(json.dumps(whole | {"commit": "older"}))
    with pytest.raises(typer.BadParameter, match="expected .*out.json to be of {'commit': 'abc'}, got .*older"):
        search.search(json=str(target), data="a", resume=True)
    with pytest.raises(typer.BadParameter, match="expected --resume with --json PATH, got --json -"):
        search.search(json="-", data="a", resume=True)


def test_every_row_is_written_at_once(tmp_path, few_rows, monkeypatch):
    target = tmp_path / "out.json"

    def stop():
        raise KeyboardInterrupt

    plan = search._plan
    monkeypatch.setattr(search, "_plan", lambda one, found: [*plan(one, found)[:2], ({"method": "x"}, stop)])
    with pytest.raises(KeyboardInterrupt):
        search.search(json=str(target), data="a")
    assert len(json.loads(target.read_text())["rows"]) == 2


FIGURES = {
    "bytes": 54,
    "recall": RECALL,
    "encode_seconds": 1.0,
    "encode_cpu_seconds": 1.0,
    "queries_per_second": 1.0,
    "queries_per_cpu_second": 1.0,
}
