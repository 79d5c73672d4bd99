import json
import shutil
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import typer  # noqa: E402
from tiny_hf import save_letters  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from interop.hf.command import hf  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with a tokenizer of single characters."""
    path = tmp_path_factory.mktemp("model")
    save_letters(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_the_command(folder, tmp_path):
    app = typer.Typer()
    app.command()(hf)
    target = tmp_path / "figures.json"
    options = ["--bits", "2/2", "--context", "700", "--positions", "32", "--new-tokens", "3", "--prompt", "hello"]
    result = CliRunner().invoke(app, [str(folder), *options, "--json", str(target)])
    assert result.exit_code == 0, result.output
    figures = json.loads(target.read_text())
    baseline, two = figures["rows"]
    assert figures["dtype"] == "float32" and "DynamicCache in float32" in result.output
    assert figures["positions"] == 32 and baseline["kl_mean"] == 0 and baseline["top1"] == 1
    assert 0 < two["kl_mean"] < two["kl_max"] < 0.1 and two["layers"] == 2
    assert baseline["nbytes"] == 2 * 2 * 64 * 732 * 4 > 4 * two["nbytes"]
    assert len(two["text"]) >= 3 and "K2/V2" in result.output


def test_a_cache_that_does_not_shrink_fails(folder):
    """A short text lies in the window and the pages reserved behind it: nothing is saved, and the command says so."""
    app = typer.Typer()
    app.command()(hf)
    options = ["--bits", "8/8", "--context", "16", "--positions", "16", "--new-tokens", "1"]
    assert CliRunner().invoke(app, [str(folder), *options]).exit_code == 1


def test_misuse(folder, tmp_path):
    app = typer.Typer()
    app.command()(hf)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    cases = [
        ("expected key/value bits like 4/4,3/3, got '4'", ["--bits", "4"]),
        ("expected a text of more than context=512 tokens, got 9", ["--text", str(tmp_path / "short.txt")]),
        ("expected a prompt of at least one token, got ''", ["--prompt", ""]),
        ("expected key/value bits of 1, 2, 2.5, 3, 3.5, 4, 5, 8, got '9/4'", ["--bits", "9/4"]),
        ("expected a text in UTF-8, got", ["--text", str(tmp_path / "latin.txt")]),
        ("is a directory", ["--text", str(tmp_path)]),
        ("expected a device that torch has, got 'nosuch'", ["--device", "nosuch"]),
        ("expected a device that torch has, got 'meta'", ["--device", "meta"]),
        ("CUDA graphs need a model on one GPU, got ['cpu']", ["--graphs"]),
        ("expected at least 3128 tokens in all, got 2048", ["--context", "3000"]),
        ("expected at least 2050 tokens in all, got 2048", ["--context", "1900", "--new-tokens", "150"]),
    ]
    for message, options in cases:
        result = CliRunner().invoke(app, [str(folder), *options], env={"COLUMNS": "2000"})
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())


def test_what_is_no_model_for_a_cache_is_refused(folder, tmp_path):
    app = typer.Typer()
    app.command()(hf)
    result = CliRunner().invoke(app, [str(tmp_path)], env={"COLUMNS": "2000"})
    assert result.exit_code == 2 and "Unrecognized model in" in result.output
    shutil.copytree(folder, tmp_path / "thin")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "thin")
    result = CliRunner().invoke(app, [str(tmp_path / "thin")], env={"COLUMNS": "2000"})
    assert result.exit_code == 2 and "dim from 16 to 512 is supported, got dim=8" in result.output
    weights = tmp_path / "thin" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = CliRunner().invoke(app, [str(tmp_path / "thin")], env={"COLUMNS": "2000"})
    assert result.exit_code == 2 and "a file of weights is damaged or cut off" in result.output


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_packages_are_needed(package, folder, monkeypatch):
    app = typer.Typer()
    app.command()(hf)
    monkeypatch.delitem(sys.modules, "interop.hf.measure", raising=False)
    monkeypatch.delattr("interop.hf.measure", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(app, [str(folder)], env={"COLUMNS": "2000"})
    assert result.exit_code == 2 and 'pip install -e ".[torch,hf]" in a checkout of tq-jax' in result.output


def test_a_model_without_sdpa(folder, tmp_path):
    """The baseline is the model with its own attention."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    config = transformers.Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, sliding_window=32,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    app, target = typer.Typer(), tmp_path / "figures.json"
    app.command()(hf)
    options = ["--bits", "4/4", "--context", "700", "--positions", "16", "--new-tokens", "1", "--json", str(target)]
    result = CliRunner().invoke(app, [str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    figures = json.loads(target.read_text())
    assert f"float32 with {figures['attention']} against" in result.output
    assert figures["rows"][1]["layers"] == 1 and figures["rows"][1]["kl_mean"] < 0.1


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny random Llava with its processor, and an image."""
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("seeing")
    words = {word: i for i, word in enumerate(["<unk>", "<image>", *(f"w{i}" for i in range(98))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = dict(size={"shortest_edge": 280}, crop_size={"height": 280, "width": 280})
    transformers.LlavaProcessor(
        getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(**size),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=["<image>"],
            model_input_names=["input_ids", "attention_mask"],
        ),
        patch_size=14, num_additional_image_tokens=1, vision_feature_select_strategy="default",
        chat_template="{% for c in messages[0].content %}{{ c.text or ' <image> ' }}{% endfor %}",
    ).save_pretrained(path)  # fmt: skip
    torch.manual_seed(0)
    text = dict(model_type="llama", vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=64, initializer_range=0.08)
    vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    vision |= dict(num_attention_heads=2, image_size=280, patch_size=14)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=1)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    Image.effect_noise((300, 290), 80).convert("RGB").save(path / "noise.png")
    return path


def test_an_image(seeing, tmp_path):
    """Two images of 400 tokens each, far longer than the window."""
    app, target = typer.Typer(), tmp_path / "figures.json"
    app.command()(hf)
    shown = ["--image", str(seeing / "noise.png")]
    options = [*shown, *shown, "--bits", "8/8,2/2", "--new-tokens", "9", "--prompt", "w1 w2", "--json", str(target)]
    result = CliRunner().invoke(app, [str(seeing), *options])
    assert result.exit_code == 0, result.output
    figures = json.loads(target.read_text())
    baseline, eight, two = figures["rows"]
    assert figures["positions"] == 9 and figures["shown"] == [{"image": str(seeing / "noise.png")}] * 2
    assert baseline["nbytes"] == 2 * 2 * 64 * 4 * (802 + 8) > 1.9 * eight["nbytes"] > 2 * two["nbytes"]
    assert baseline["kl_mean"] == 0 and eight["text"] == baseline["text"] and len(baseline["text"].split()) == 9
    assert 0 < 10 * eight["kl_mean"] < two["kl_mean"] and two["layers"] == 2 and baseline["ms_per_token"] > 0


def test_misuse_of_images(seeing, folder, tmp_path):
    app = typer.Typer()
    app.command()(hf)
    (tmp_path / "no.png").write_text("no image")
    image = ["--image", str(seeing / "noise.png")]
    cases = [
        ("expected no --context with --image or --video", [str(seeing), *image, "--context", "5"]),
        ("expected no --graphs with --image or --video", [str(seeing), *image, "--graphs"]),
        ("no.png", [str(seeing), "--image", str(tmp_path / "no.png")]),
        ("does not exist", [str(seeing), "--video", str(tmp_path / "none.mp4")]),
        ("", [str(folder), *image]),
    ]
    for message, options in cases:
        result = CliRunner().invoke(app, options, env={"COLUMNS": "2000"})
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.replace("│", " ").split())
