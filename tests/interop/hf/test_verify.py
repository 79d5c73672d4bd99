"""`tq-jax verify` on small models: what it claims, and that it fails if a claim does not hold."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import typer  # noqa: E402
from tiny_hf import save_letters, tiny  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from interop.hf.verify_command import verify  # noqa: E402

QUICK = ["--context", "400", "--positions", "16", "--new-tokens", "4"]
FIXED = dict(vocab_size=128, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_letters(path)
    tiny(**FIXED, head_dim=64, initializer_range=0.15).save_pretrained(path)
    return path


def run(*arguments):
    app = typer.Typer()
    app.command()(verify)
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "2000"})


def said(result):
    return " ".join(result.output.replace("│", " ").split())


def test_a_model_that_works(folder, tmp_path):
    target = tmp_path / "figures.json"
    result = run(folder, *QUICK, "--json", target)
    assert result.exit_code == 0, result.output
    assert "compresses 2 of 2 layers [0, 1] to K4/V4" in said(result) and "6 of 6 hold" in result.output
    found = json.loads(target.read_text())
    assert found["layers"] == [{"layer": i, "compressed": True, "why_not": None} for i in range(2)]
    exact, ours = found["tokens"].values()
    assert exact == ours and len(exact) == 4
    assert [row["cache"] for row in found["rows"]] == ["baseline", "K4/V4", "K8/V8"]
    assert 0 < found["rows"][2]["kl_mean"] < found["rows"][1]["kl_mean"]
    assert found["bytes"]["DynamicCache"] == 2 * 2 * 2 * 64 * 4 * 416 and found["bytes"]["ratio"] > 2
    read = next(claim for claim in found["claims"] if claim["name"].startswith("tokens read from codes"))
    assert read["figure"] == 400 + 3 - 128 - 4


def test_layers_that_are_kept_have_a_reason(tmp_path):
    save_letters(tmp_path)
    kinds = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=32, use_sliding_window=True)
    tiny("Qwen3", **FIXED, **kinds).save_pretrained(tmp_path)
    result = run(tmp_path, *QUICK, "--json", "-")
    found = json.loads(result.stdout)
    assert found["layers"][0]["why_not"] == "keeps the latest tokens of its sliding window only"
    assert found["layers"][1]["compressed"] and result.exit_code == 0


@pytest.mark.parametrize(
    ("options", "failed"),
    [
        (["--bits", "1/1", "--max-kl", "1e-4"], "KL of the next token, K1/V1, nats"),
        (["--prompt", "too short to leave the window"], "tokens read from codes, K8/V8"),
        (["--context", "16", "--bits", "8/8"], "bytes of DynamicCache per byte of K8/V8"),
    ],
)
def test_what_does_not_hold_fails(folder, options, failed):
    result = run(folder, *QUICK, *options)
    assert result.exit_code == 1 and f"FAIL {failed}" in result.output


def test_other_greedy_tokens_fail(folder, monkeypatch):
    """As if 8 bits were 1."""
    from interop.hf import verify as module

    monkeypatch.setattr(module, "EIGHT", (1.0, 1.0))
    result = run(folder, *QUICK, "--new-tokens", "8")
    assert result.exit_code == 1 and "FAIL greedy tokens equal to DynamicCache's, K1/V1" in result.output
    assert "the first other token is" in said(result)


def test_a_model_outside_the_interface(tmp_path):
    save_letters(tmp_path)
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=128, hidden_size=64, n_layer=2, n_head=2, initializer_range=0.08, bos_token_id=1, eos_token_id=None
    )
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    result = run(tmp_path, *QUICK)
    assert result.exit_code == 2 and "got BloomForCausalLM" in said(result) and "or dense=True" in said(result)
    result = run(tmp_path, *QUICK, "--dense")
    assert result.exit_code == 0 and "TurboQuantCache(dense=True) saves storage only" in said(result), result.output


def test_misuse(folder, tmp_path):
    cases = [
        ("expected one pair of bits like 4/4, got '4/4,3/3'", [folder, "--bits", "4/4,3/3"]),
        ("expected at least 3064 tokens in all, got 1024", [folder, "--context", "3000"]),
        ("Unrecognized model in", [tmp_path]),
    ]
    for message, arguments in cases:
        result = run(*arguments)
        assert result.exit_code == 2 and message in said(result), result.output
