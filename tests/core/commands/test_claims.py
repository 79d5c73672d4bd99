import json
import math

import pytest
import typer

from tq_jax.commands.claims import Claim, conclude, measure
from tq_jax.commands.output import open_console, write_json


def holds():
    """Holds."""
    return [Claim("holds", 0.5, "<=", 1.0, judgement="true but trivial", details={"part": 0.25})]


def breaks():
    """Breaks."""
    return [Claim("breaks", 2.0, "<=", 1.0, judgement="true")]


@pytest.mark.parametrize(
    ("figure", "relation", "bound", "ok"),
    [(1.0, "<=", 1.0, True), (1.1, "<=", 1.0, False), (1.0, ">=", 1.0, True), (0.9, ">=", 1.0, False)],
)
def test_a_claim_holds_exactly_up_to_its_bound(figure, relation, bound, ok):
    assert Claim("x", figure, relation, bound).ok is ok


@pytest.mark.parametrize("relation", ["<=", ">="])
def test_a_nan_never_holds(relation):
    claim = Claim("x", math.nan, relation, 1.0)
    assert not claim.ok
    assert claim.verdict == "FAIL"


def test_measure_keeps_the_order_of_the_checks():
    claims = measure([breaks, holds], open_console("-"))
    assert [claim.name for claim in claims] == ["breaks", "holds"]


def test_conclude_writes_json_with_the_judgement(tmp_path, capsys):
    path = tmp_path / "claims.json"
    conclude("title", [holds], str(path))
    (claim,) = json.loads(path.read_text())["claims"]
    assert claim["verdict"] == "true but trivial"
    assert claim["details"] == {"part": 0.25}
    assert {"name", "figure", "bound", "ok", "verdict"} <= set(claim)
    assert "1 of 1 hold" in capsys.readouterr().out


def test_a_broken_claim_exits_1_after_writing_json(tmp_path, capsys):
    path = tmp_path / "claims.json"
    with pytest.raises(typer.Exit) as exit_:
        conclude("title", [holds, breaks], str(path))
    assert exit_.value.exit_code == 1
    assert [claim["ok"] for claim in json.loads(path.read_text())["claims"]] == [True, False]
    out = capsys.readouterr().out
    assert "1 of 2 hold" in out
    assert "FAIL breaks" in out


def test_json_on_standard_output_is_alone_there(capsys):
    conclude("title", [holds], "-")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["claims"][0]["name"] == "holds"
    assert "1 of 1 hold" in captured.err


def test_json_says_null_where_numbers_are_not_finite(capsys):
    write_json({"rows": [{"a": math.inf, "b": (1, 2.5)}]}, "-")
    assert json.loads(capsys.readouterr().out) == {"rows": [{"a": None, "b": [1, 2.5]}]}
