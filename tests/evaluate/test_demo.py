import json

import pytest
import typer
from flax import nnx
from typer.testing import CliRunner

from tq_jax import cli
from tq_jax.evaluate import demo as room
from tq_jax.evaluate.language import CHUNK, Quality, published_scheme, tq_scheme
from tq_jax.models import Decoder, DecoderConfig


@pytest.mark.weights
@pytest.mark.slow
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
    assert room.parse_bits("8/4,3.5/2") == [(8.0, 4.0), (3.5, 2.0)]
    for wrong in ("4", "4/4/4", "a/b", ""):
        with pytest.raises(typer.BadParameter, match="expected key/value bits like 4/4,3/3, got"):
            room.parse_bits(wrong)


def row(scheme, kl, ppl=10.0):
    return room.Row(scheme, Quality(64, kl, kl, 1.0, 64, ppl, 10.0), 1.0, 1.0, 1)


def test_claims_can_fail():
    config = DecoderConfig(vocab_size=8, dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    ours = tq_scheme(decoder, 64, key_bits=4, value_bits=4)
    plain = published_scheme(decoder, 64, key_bits=4, value_bits=4)
    good = room.check_claims([row(ours, 0.001), row(plain, 0.002)], default=True)
    assert len(good) == 3
    assert all(good.values())
    bad = room.check_claims([row(ours, 0.02, ppl=11.0), row(plain, 0.002)], default=True)
    assert not any(bad.values())
    assert len(room.check_claims([row(ours, 0.02)], default=False)) == 0
