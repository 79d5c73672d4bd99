import dataclasses
import json

import pytest
import tokenizers
import typer
from flax import nnx
from typer.testing import CliRunner

from tq_jax.commands import cli
from tq_jax.commands.demo import command as room
from tq_jax.commands.divergence import CHUNK, Quality, published_scheme, tq_scheme
from tq_jax.commands.options import parse_bits
from tq_jax.models import Decoder, DecoderConfig, LanguageModel
from tq_jax.models.tokenizer import Tokenizer

CONFIG = DecoderConfig(vocab_size=8, dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32)


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.usefixtures("usual_compiler")
def test_demo_on_the_real_model(tmp_path):
    picture, figures = tmp_path / "demo.png", tmp_path / "demo.json"
    arguments = ["demo", "--bits", "4/4", "--positions", str(2 * CHUNK), "--plot", str(picture), "--json", str(figures)]
    result = CliRunner().invoke(cli.build(["demo"]), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["positions"] == 2 * CHUNK
    assert [row["label"] for row in found["rows"]] == ["bfloat16", "K4/V4", "K4/V4 as published"]
    full, ours, plain = found["rows"]
    assert full["kl_mean"] < 1e-3
    assert ours["kl_mean"] < plain["kl_mean"] < 0.02
    assert ours["ratio_compressed"] > 3.7
    assert "Kellynch" in full["answer"]
    assert "Kellynch" in ours["answer"]
    assert ours["tokens_per_second"] > 0
    assert plain["answer"] is None
    assert all(found["claims"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bits():
    assert parse_bits("8/4,3.5/2") == [(8.0, 4.0), (3.5, 2.0)]
    for wrong in ("4", "4/4/4", "a/b", ""):
        with pytest.raises(typer.BadParameter, match="expected key/value bits like 4/4,3/3, got"):
            parse_bits(wrong)


def small_model(context, *, chat):
    """A random model whose tokens are words."""
    decoder = Decoder(dataclasses.replace(CONFIG, max_context=context), rngs=nnx.Rngs(0))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0}, unk_token="word"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = "{{ messages[0]['content'] }}" if chat else None
    return LanguageModel(decoder, Tokenizer(words, chat_template=template, special={}))


@pytest.mark.parametrize(
    ("context", "chat", "words", "message"),
    [
        (2048, True, 3000, "the model's context: expected at least 2049 tokens in all, got 2048"),
        (1055, True, 1030, "the model's context: expected at least 1056 tokens in all, got 1055"),
        (2049, True, 1025, "the text: expected at least 1026 tokens in all, got 1025"),
        (2049, False, 3000, "expected a model with a chat template"),
    ],
)
def test_what_the_model_cannot_read_is_found_before_the_work(context, chat, words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "open_model", lambda name: small_model(context, chat=chat))
    (tmp_path / "text.txt").write_text("word " * words)
    with pytest.raises(typer.BadParameter, match=message):
        room.demo(text=tmp_path / "text.txt", plot=tmp_path / "x.png")


def row(scheme, kl, ppl=10.0):
    return room.Row(scheme, Quality(64, kl, kl, 1.0, 64, ppl, 10.0), {}, 1)


def test_claims_can_fail():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    ours = tq_scheme(decoder, 64, key_bits=4, value_bits=4)
    plain = published_scheme(decoder, 64, key_bits=4, value_bits=4)
    good = room.check_claims([row(ours, 0.001), row(plain, 0.002)], default=True)
    assert len(good) == 3
    assert all(good.values())
    bad = room.check_claims([row(ours, 0.02, ppl=11.0), row(plain, 0.002)], default=True)
    assert not any(bad.values())
    assert len(room.check_claims([row(ours, 0.02)], default=False)) == 0
