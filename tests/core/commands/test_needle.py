import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from typer.testing import CliRunner

from tq_jax.commands import cli
from tq_jax.commands.eval.schemes import Rounded, candidates
from tq_jax.commands.needle import command as room
from tq_jax.commands.needle.haystack import DIGITS, Haystack, Question, make_haystack
from tq_jax.commands.rivals.roundings import Float8, Rival
from tq_jax.models import load_tokenizer


@pytest.mark.slow
def test_answers_are_graded_as_the_model_predicts_them(decoder):
    ids = np.random.default_rng(0).integers(0, 97, 230).tolist()
    shared = ids[:200]
    questions = [Question(0.1, ids[200:210], ids[210:217]), Question(0.9, ids[205:207], ids[220:223])]
    # An answer that the model itself gives is found.
    text = shared + questions[1].prompt
    greedy = []
    forward = jax.jit(lambda d, t: d.logits(d.forward(t)))
    for _ in range(3):
        padded = np.zeros((1, 240), np.int32)
        padded[0, : len(text) + len(greedy)] = text + greedy
        greedy.append(int(jnp.argmax(forward(decoder, jnp.asarray(padded))[0, len(text) + len(greedy) - 1])))
    questions[1] = Question(0.9, questions[1].prompt, greedy)
    haystack = Haystack(shared, questions)
    prompt = room.read_prompt(decoder, haystack, 208)
    exact = Rounded(Rival("none", "none", Float8(), Float8(), exact_layers=2), 208 + 128, 128, 4)
    for scheme in (candidates(decoder, 208 + 128, bits=[], window=128)[0], exact):
        found = room.ask(decoder, prompt, haystack, scheme)
        assert [f["depth"] for f in found] == [0.1, 0.9]
        assert [f["exact"] for f in found] == [False, True]
        for question, graded in zip(questions, found, strict=True):
            text = shared + question.prompt + question.answer
            padded = np.zeros((1, 240), np.int32)
            padded[0, : len(text)] = text
            log_probs = jax.nn.log_softmax(forward(decoder, jnp.asarray(padded))[0])
            start = len(text) - len(question.answer)
            expected = sum(float(log_probs[start - 1 + i, token]) for i, token in enumerate(question.answer))
            assert graded["log_prob"] == pytest.approx(expected, abs=0.05)  # bfloat16 keys and values


def row(label, exact, log_prob, depth=0.5):
    return {"label": label, "length": 1024, "seed": 0, "depth": depth, "exact": exact, "log_prob": log_prob}


def test_claims_can_fail():
    full = [row("bfloat16", True, -0.6), row("bfloat16", True, -3.0, 0.7), row("bfloat16", False, -7.0, 0.9)]
    good = room.judge([*full, row("K4/V4", True, -0.65), row("K4/V4", False, -3.2, 0.7), row("K4/V4", True, -6.9, 0.9)])
    assert [claim.figure for claim in good] == [1.0, pytest.approx(-0.15 / 3 / DIGITS)]
    assert all(claim.ok for claim in good)
    assert good[0].note == "1 of 1 known, 2 and 2 found in all"
    lost = [row("K4/V4", False, log_prob, depth) for log_prob, depth in ((-3.0, 0.5), (-6.0, 0.7), (-8.0, 0.9))]
    bad = room.judge([*full, *lost, row("K3/V3", False, -1.0)])
    assert len(bad) == 3
    assert not any(claim.ok for claim in bad)
    assert room.judge(full) == []


@pytest.mark.weights
def test_haystacks_hold_their_facts():
    from tq_jax.models import convert_gguf, fetch_default_model

    tokenizer = load_tokenizer(convert_gguf(fetch_default_model()))
    haystack = make_haystack(tokenizer, 900, (0.1, 0.9), seed=3)
    text = tokenizer.decode(haystack.tokens, skip_special_tokens=False)
    assert 860 <= len(haystack.tokens) <= 900
    assert text.startswith("<|im_start|>")
    places = []
    for question in haystack.questions:
        number = tokenizer.decode(question.answer)
        assert len(number) == len(question.answer) == DIGITS
        assert text.count(f" is {number}.") == 1
        places.append(text.index(number) / len(text))
        asked = tokenizer.decode(question.prompt)
        assert asked.startswith("What is the phone number of")
        assert asked.endswith(" is ")
        assert number not in asked
    assert 0 < places[0] < 0.3
    assert 0.7 < places[1] < 1
    with pytest.raises(ValueError, match="expected a length of about 200"):
        make_haystack(tokenizer, 50, (0.5,), seed=0)
    with pytest.raises(ValueError, match="expected at most 12 depths, got 13"):
        make_haystack(tokenizer, 900, tuple(i / 13 for i in range(13)), seed=0)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "expected a length of about 200 tokens or more, got 0"),
        (["--lengths", "512,8192"], "the model's context: expected at least 8256 tokens in all, got 8192"),
        (["--facts", "6"], "expected at most as many --facts as --depths (5), got 6"),
        (["--facts", "13", "--depths", ",".join(f"{i / 13}" for i in range(13))], "expected at most 12 depths, got 13"),
    ],
)
def test_haystacks_that_cannot_be_made_are_found_before_the_work(arguments, message, tmp_path):
    assert message in refused("needle", *arguments, "--plot", str(tmp_path / "x.png"))


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("usual_compiler")
def test_needle_on_the_real_model(tmp_path):
    figures, picture = tmp_path / "needle.json", tmp_path / "needle.png"
    arguments = ["--lengths", "512", "--depths", "0.2,0.8", "--repeats", "1", "--bits", "4/4"]
    arguments += ["--json", str(figures), "--plot", str(picture)]
    CliRunner().invoke(cli.build(["needle"]), ["needle", *arguments], catch_exceptions=False)
    rows = json.loads(figures.read_text())["rows"]
    by_label = {label: [r["log_prob"] for r in rows if r["label"] == label] for label in ("bfloat16", "K4/V4")}
    assert all(len(found) == 2 for found in by_label.values())
    assert {row["depth"] for row in rows} == {0.2, 0.8}
    kept = json.loads(figures.read_text())
    longest = [row | {"ratio_total": 9.0} for row in rows]  # as in a run whose longest text was another
    figures.write_text(json.dumps(kept | {"rows": longest[:-1]}))
    CliRunner().invoke(cli.build(["needle"]), ["needle", *arguments, "--resume"], catch_exceptions=False)
    assert json.loads(figures.read_text())["rows"] == [*longest[:-1], rows[-1]]
    assert np.mean(by_label["K4/V4"]) == pytest.approx(np.mean(by_label["bfloat16"]), abs=0.5)
    assert picture.read_bytes().startswith(b"\x89PNG")
