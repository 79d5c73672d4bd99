import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from refusals import refused
from typer.testing import CliRunner

from tq_jax.commands import cli
from tq_jax.commands.divergence import Reference, full_scheme, run_prompt, tq_scheme
from tq_jax.commands.eval.schemes import Packed, Rounded
from tq_jax.commands.rivals.calibrated import EVERY
from tq_jax.commands.rivals.roundings import Float8, Rival
from tq_jax.commands.tasks import measure, steps
from tq_jax.commands.tasks.item import Item
from tq_jax.commands.tasks.picture import draw
from tq_jax.commands.tasks.questions import Task, encode, make_batches
from tq_jax.commands.tasks.score import judge
from tq_jax.models import Decoder, DecoderConfig, LanguageModel, Tokenizer, generate

BY_LABEL = {rival.label: dataclasses.replace(rival, label=f"{rival.label} alone") for rival in EVERY}
"""Rivals under other labels, so that a program serves one of them and compiles sooner."""

EXACT = Rival("none", "none", Float8(), Float8(), exact_layers=2)
"""Three layers of which none is quantized."""

ROOM = 96


@pytest.fixture(scope="module")
def prompts():
    """Two prompts of 40 and 23 tokens."""
    tokens = np.random.default_rng(0).integers(0, 97, (2, 40)).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray([40, 23], jnp.int32)


def written(decoder, prompts, way, stop=(), most=12):
    stop = jnp.asarray(np.array(stop, np.int32))
    found, _ = steps.write_answers(decoder, *prompts, stop, way.empty(decoder, *prompts), steps=way, most=most)
    return np.array(found)


@pytest.mark.slow
def test_answers_are_those_of_generate(decoder, prompts):
    scheme = full_scheme(decoder, ROOM, dtype="float32")
    free = generate(decoder, *prompts, cache_spec=scheme.cache, max_new_tokens=12).sequences()
    stop = [free[0][4]]
    expected = generate(decoder, *prompts, cache_spec=scheme.cache, max_new_tokens=12, stop_tokens=stop)
    found = written(decoder, prompts, steps.steps_of(Packed(scheme)), stop)
    assert [row[row >= 0].tolist() for row in found] == expected.sequences()
    assert len(expected.sequences()[0]) <= 5


@pytest.mark.slow
def test_a_rival_that_rounds_nothing_answers_as_full_precision(decoder, prompts):
    full = written(decoder, prompts, steps.steps_of(Packed(full_scheme(decoder, ROOM))))
    exact = written(decoder, prompts, steps.steps_of(Rounded(EXACT, ROOM, window=8, sinks=4)))
    assert exact.tolist() == full.tolist()


@pytest.mark.sampled
@pytest.mark.parametrize("label", ["KIVI 2, groups of 32", "TurboQuant mse 3", "vLLM 3bit_nc", "int4, Hadamard"])
def test_sequences_decode_as_each_does_alone(decoder, prompts, label):
    rounded = Rounded(BY_LABEL[label], ROOM, window=8, sinks=4)
    way, (tokens, lengths) = steps.steps_of(rounded), prompts
    _, rows = way.begin(decoder, tokens, lengths, way.empty(decoder, *prompts))
    alone = [_alone(decoder, rounded, tokens[i, :count]) for i, count in enumerate((40, 23))]
    for drawn in ([5, 9], [60, 2], [7, 7]):
        together, rows = way.step(decoder, jnp.asarray(drawn, jnp.int32), jnp.ones(2, jnp.int32), rows)
        for i, token in enumerate(drawn):
            logits, alone[i] = rounded.extend(decoder, jnp.asarray([[token]], jnp.int32), alone[i])
            np.testing.assert_allclose(together[i], logits[0], atol=1e-4)


def _alone(decoder, rounded, tokens):
    _, projections = run_prompt(decoder, tokens[None])
    return rounded.start(decoder, Reference(tokens, tokens.size, projections, []))


@pytest.mark.slow
def test_a_sequence_that_has_stopped_stays_as_it_is(decoder, prompts):
    way = steps.steps_of(Rounded(BY_LABEL["fp8 e4m3"], ROOM, window=0, sinks=0))
    _, rows = way.begin(decoder, *prompts, way.empty(decoder, *prompts))
    token = jnp.asarray([5, 9], jnp.int32)
    _, one = way.step(decoder, token, jnp.asarray([1, 0], jnp.int32), rows)
    assert one.lengths.tolist() == [41, 23]
    both, _ = way.step(decoder, token, jnp.ones(2, jnp.int32), rows)
    late, _ = way.step(decoder, token, jnp.asarray([0, 1], jnp.int32), one)
    np.testing.assert_allclose(late[1], both[1], atol=1e-4)


@pytest.mark.slow
def test_divergence_of_each_step(decoder, prompts):
    exact = steps.steps_of(Packed(full_scheme(decoder, ROOM, dtype="float32")))
    coarse = steps.steps_of(Packed(tq_scheme(decoder, ROOM, key_bits=2, value_bits=2)))
    answers = written(decoder, prompts, exact)
    answers[1, 5:] = -1

    def divergence(way):
        caches = (one.empty(decoder, *prompts) for one in (way, exact))
        given = (*prompts, jnp.asarray(answers))
        return np.asarray(steps.step_divergence(decoder, *given, *caches, steps=way, exact=exact)[0])

    same, found = divergence(exact), divergence(dataclasses.replace(coarse))
    assert np.isnan(same[1, 5:]).all() and np.nanmax(np.abs(same)) == 0
    np.testing.assert_array_equal(np.isnan(found), np.isnan(same))
    assert abs(found[:, 0]).max() < 1e-6  # a prompt attends exactly
    direct = _direct(decoder, coarse, exact, prompts, answers)
    np.testing.assert_allclose(found[0, 1:5], direct, atol=5e-7)  # float32 rounds so much
    assert found[0, 1:5].max() > 3e-6


def _direct(decoder, way, exact, prompts, answers):
    """Divergences of tokens 1 to 4 of the first answer, from two runs of their own."""
    runs = []
    for one in (exact, way):
        _, cache = one.begin(decoder, *prompts, one.empty(decoder, *prompts))
        log_probs = []
        for index in range(4):
            logits, cache = one.step(decoder, jnp.asarray(answers[:, index]), jnp.ones(2, jnp.int32), cache)
            log_probs.append(np.asarray(jax.nn.log_softmax(logits[0]), np.float64))
        runs.append(np.stack(log_probs))
    return np.sum(np.exp(runs[0]) * (runs[0] - runs[1]), axis=-1)


WORDS = ("<end>", "yes", "no", "sky", "blue", "is", "the", "?")


@pytest.fixture(scope="module")
def model():
    """A random model of eight words."""
    config = DecoderConfig(
        vocab_size=8, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32, max_context=256,
        stop_tokens=(0,),
    )  # fmt: skip
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return LanguageModel(Decoder(config, rngs=nnx.Rngs(0)), Tokenizer(words, chat_template=None, special={}))


def word_task(*prompts, most=6):
    def grade(answer):
        return float("yes" in answer)

    return Task("words", [Item(f"q{i}", prompt, grade) for i, prompt in enumerate(prompts)], most)


@pytest.mark.slow
def test_every_cache_answers_and_known_rows_stay(model):
    task = word_task("the sky is blue", "is the sky blue no", "is the sky")
    batches = make_batches(model, task, batch=2)
    assert [batch.tokens.shape for batch in batches] == [(2, 5), (2, 5)]
    assert [len(batch.items) for batch in batches] == [2, 1]
    plan = measure.Plan(((4, 4),), (8, 0), only=("K4/V4", "fp8"))
    labels = []
    rows = list(measure.measure_task(model, task, batches, plan, [], advance=labels.append))
    assert [(row["label"], row["window"]) for row in rows] == [
        ("float32", None), ("K4/V4", 8), ("fp8 e4m3", 8), ("K4/V4", 0), ("fp8 e4m3", 0)
    ]  # fmt: skip
    assert labels == [row["label"] for row in rows for _ in batches]
    assert all(row["items"] == 3 and set(row["scores"]) == {"q0", "q1", "q2"} for row in rows)
    assert rows[0]["kl_by_step"] == [] and all(row["kl_by_step"] for row in rows[1:])
    # Nothing leaves the window of 8 but at the end, and 8-bit codes are nearer than 4-bit codes.
    assert rows[1]["kl_mean"] < rows[3]["kl_mean"]
    again = list(measure.measure_task(model, task, batches, plan, rows[:2]))
    assert [row["label"] for row in again] == [row["label"] for row in rows[2:]]
    assert again == rows[2:]
    assert list(measure.measure_task(model, task, batches, plan, rows)) == []


def test_a_question_that_exceeds_the_context_is_refused(model):
    from typer import BadParameter

    with pytest.raises(BadParameter, match="words: expected at most 256 tokens of .*, got 4 and 253"):
        make_batches(model, word_task("the sky is blue", most=253), batch=2)


def test_the_first_words_of_an_answer_stand_behind_the_prompt(model):
    tokenizer, item = model.tokenizer, Item("q", "is the sky blue ?", len, begins=" yes the")
    assert encode(tokenizer, item) == [5, 6, 3, 4, 7, 1, 6]
    chat = dataclasses.replace(tokenizer, chat_template="the {{ messages[0]['content'] }} no")
    assert encode(chat, item) == [6, 5, 6, 3, 4, 7, 2, 1, 6]


def row(label, scores, window=128):
    score = float(np.mean(list(scores.values())))
    return {
        "task": "t", "label": label, "scheme": "tq", "window": window, "scores": scores, "score": score, "low": 0.0,
        "high": 1.0, "items": len(scores), "kl_by_step": [{"first": 1, "last": 1, "kl": 0.1}],
    }  # fmt: skip


def test_claims_can_fail(tmp_path):
    right = {f"q{i}": 1.0 for i in range(12)}
    full = row("float32", right, window=None)
    lost = row("K4/V4", right | {f"q{i}": 0.0 for i in range(7)}, window=0)
    few = row("K3/V3", right | {"q0": 0.0})
    free = row("K3/V3", right | {f"q{i}": 0.0 for i in range(12)}, window=0)  # nothing is claimed without a window
    claims = judge([full, lost, few, free], "float32")
    assert [claim.ok for claim in claims] == [False, True]
    assert claims[0].figure == pytest.approx(0.5**7)
    assert claims[0].note == "41.7% beside 100.0%: 7 lost, 0 gained of 12"
    draw([full, lost, few, free], tmp_path / "x.png", title="t")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_steps_of_none_are_no_mean():
    assert measure.by_step([]) == {"kl_mean": 0.0, "kl_by_step": []}
    assert measure.by_step([np.array([[0.0, math.nan]])]) == {"kl_mean": 0.0, "kl_by_step": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "gsm8k", "--positions", "64"],
            "expected no --positions with --task, whose questions are no texts, got 64",
        ),
        (["--new-tokens", "9"], "expected no --new-tokens without --task, got 9"),
    ],
)
def test_options_without_an_effect_are_refused(arguments, message, tmp_path):
    assert message in refused("eval", *arguments, "--plot", str(tmp_path / "x.png"))


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("usual_compiler")
def test_questions_to_the_real_model(tmp_path):
    figures, picture = tmp_path / "tasks.json", tmp_path / "tasks.png"
    arguments = ["--task", "gsm8k", "--items", "1", "--new-tokens", "9", "--bits", "4/4", "--windows", "0"]
    arguments += ["--only", "K4/V4", "--json", str(figures), "--plot", str(picture)]
    result = CliRunner().invoke(cli.build(["eval"]), ["eval", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["complete"] and [r["label"] for r in found["rows"]] == ["float32", "K4/V4"]
    ours = found["rows"][1]
    assert 0 < ours["kl_mean"] < 0.1 and ours["kl_by_step"][-1]["last"] == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
