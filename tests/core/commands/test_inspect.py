import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from caches import make_spec, tokens
from refusals import refused
from typer.testing import CliRunner

import tq_jax as tq
from tq_jax import files, search
from tq_jax.commands import cli

pytest.importorskip("safetensors")


def run(*arguments):
    return CliRunner().invoke(cli.build(["inspect"]), ["inspect", *map(str, arguments)])


@pytest.fixture
def saved(tmp_path):
    """One file of each kind."""
    cache = tq.append(tq.init_cache(make_spec(), 2), *tokens(2, 100)[:2], lengths=jnp.asarray([100, 40], jnp.int32))
    tq.save_cache(cache, tmp_path / "cache")
    search.save(
        search.build(np.random.default_rng(0).normal(size=(200, 32)), search.IndexSpec(dim=32)), tmp_path / "index"
    )
    tq.save_statistics(np.full((3, 2, 16), 2.0), np.ones((3, 2, 16)), tmp_path / "statistics")
    return tmp_path


def test_says_what_files_hold(saved):
    expected = {
        "cache": {"rows": 2, "tokens per row": "40 to 100", "of them compressed": "12 to 72"},
        "index": {"vectors": 200, "dimensions": 32, "bytes of a vector": 20},
        "statistics": {"layers": 3, "KV heads": 2, "norm of a mean key": "8 to 8"},
    }
    for name, facts in expected.items():
        result = run(saved / name, "--json", "-")
        assert result.exit_code == 0
        report = json.loads(result.stdout)
        assert facts.items() <= report["facts"].items()
        assert report["ok"]
        assert report["bytes"] == (saved / name).stat().st_size
        assert sum(row["bytes"] for row in report["arrays"]) < report["bytes"]
        assert "sound" in result.stderr
        assert report["arrays"][0]["name"] in run(saved / name).stdout


def test_ratio_counts_everything(saved):
    facts = json.loads(run(saved / "cache", "--json", "-").stdout)["facts"]
    cache = tq.load_cache(saved / "cache", max_tokens=4 + 24 + 80)  # the pages in use: five of 16 tokens
    assert facts["bytes of all arrays"] == cache.nbytes
    assert facts["bytes of the same tokens in bfloat16"] == 140 * 2 * 2 * 32 * 2
    full = tq.init_cache(tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=32, max_tokens=8), 1)
    tq.save_cache(full, saved / "full")
    assert "full precision (bfloat16)" in run(saved / "full").stdout
    tq.save_cache(tq.init_cache(make_spec(), 0), saved / "none")
    assert json.loads(run(saved / "none", "--json", "-").stdout)["facts"]["tokens per row"] == "none"


def test_what_is_not_sound_fails(saved):
    whole = bytearray((saved / "cache").read_bytes())
    whole[-5] ^= 1
    (saved / "damaged").write_bytes(whole)
    files.write_arrays(saved / "other", {"format": "else"}, {})
    (saved / "empty").write_text("")
    wrong = [("damaged", "is damaged"), ("other", "got 'else'"), ("missing", "no file"), ("", "got the folder")]
    for name, message in (*wrong, ("empty", "expected a safetensors file")):
        result = run(saved / name, "--json", "-")
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        assert not report["ok"]
        assert message in report["verdict"]
        assert "not sound" in result.stderr


def test_the_report_does_not_replace_the_file(saved):
    before = (saved / "cache").read_bytes()
    assert run(saved / "cache", "--json", saved / "other" / ".." / "cache").exit_code == 2
    assert run(saved / "cache", "--json", saved / "cache").exit_code == 2
    assert (saved / "cache").read_bytes() == before


def test_the_package_is_needed(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert 'pip install -e ".[models]" in a checkout of tq-jax' in refused("inspect", str(saved / "cache"))
