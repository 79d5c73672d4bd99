"""Key statistics of a model: what they are, and where `tq-jax calibrate` writes them."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import typer  # noqa: E402
from tiny_hf import tiny  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.hf import ATTENTION, CACHE_ARGUMENT, TurboQuantCache  # noqa: E402
from interop.hf.calibrate import FIRST_TOKENS, calibrate, main  # noqa: E402
from interop.hf.calibrate_command import calibrate as command  # noqa: E402
from interop.hf.capture import capture  # noqa: E402
from interop.torch.key_statistics import key_statistics  # noqa: E402
from tq_jax.statistics_files import FILE_NAME, find_statistics, identify, read_statistics  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    tiny().save_pretrained(path)
    return path


@pytest.fixture
def model(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TQ_JAX_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(folder, tmp_path / "model")


def run(*arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "2000"})


def test_statistics_of_several_texts(tmp_path):
    """They are those of all tokens but the first of each text."""
    model = tiny(attention="sdpa")
    texts = [torch.arange(5, 95), torch.arange(120, 20, -1)]
    steps = []
    calibrate(model, texts, tmp_path / "keys", advance=lambda: steps.append(1))
    queries, keys = [], []
    for ids in texts:
        with capture(model) as captured, torch.no_grad():
            model(ids[None])
        queries.append(captured.queries[1][0, FIRST_TOKENS:])
        keys.append(captured.keys[1][0, FIRST_TOKENS:])
    expected = key_statistics(torch.cat(queries), torch.cat(keys))
    mean, weight = tq.load_statistics(tmp_path / "keys")
    np.testing.assert_allclose((mean[1], weight[1]), expected, rtol=1e-4, atol=1e-5)
    assert len(steps) == 2 and weight.std() > 0.01
    with pytest.raises(ValueError, match=r"expected at least 32 tokens after .*, got texts of \[19, 19\]"):
        calibrate(model, [text[:19] for text in texts], tmp_path / "keys")


def test_layers_without_keys_are_left_alone(tmp_path):
    """Qwen3-Next has linear attention in all layers but every fourth."""
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=0, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    model = transformers.Qwen3NextForCausalLM(config).eval()
    calibrate(model, torch.arange(60)[None], tmp_path / "keys")
    mean, weight = read_statistics(tmp_path / "keys", identify("name", model.config))
    assert [bool(x.any()) for x in mean] == [False, False, False, True]
    assert [bool((x != 1).any()) for x in weight] == [False, False, False, True]


def test_the_file_lies_beside_the_model(model, tmp_path):
    result = run(model, "--tokens", "80", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    identity = identify(model, transformers.AutoConfig.from_pretrained(model))
    assert find_statistics(identity) == model / FILE_NAME
    assert f"{model / FILE_NAME}" in result.output and "found automatically for this model" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["texts"] == {"persuasion": 80, "pydoc": 80, "code": 80} and report["shape"] == [2, 2, 32]
    assert read_statistics(model / FILE_NAME, identity)[0].any()
    transformers.AutoModelForCausalLM.from_pretrained(model)  # does not take the file for weights


def test_a_folder_that_cannot_be_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write into any folder
    result = run(model, "--tokens", "80")
    assert result.exit_code == 0, result.output
    identity = identify(model, transformers.AutoConfig.from_pretrained(model))
    assert find_statistics(identity) == identity.places[1] and identity.places[1].is_relative_to(tmp_path / "cache")


def test_an_overridden_configuration(model):
    """A server whose configuration is overridden needs statistics that were taken with it."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    field = "rope_parameters" if transformers.__version__ >= "5" else "rope_scaling"
    result = run(model, "--tokens", "80", "--overrides", json.dumps({field: rope}))
    assert result.exit_code == 0, result.output
    stretched = transformers.AutoConfig.from_pretrained(model, **{field: rope})
    assert read_statistics(model / FILE_NAME, identify(model, stretched))[0].any()
    with pytest.raises(ValueError, match="'rope': {'rope_theta': 10000.0}}, got {'rope': {'factor': 2.0, "):
        read_statistics(model / FILE_NAME, identify(model, transformers.AutoConfig.from_pretrained(model)))


def test_a_named_file(model, tmp_path):
    (tmp_path / "text").write_text("All happy families are alike. " * 40)
    result = run(model, "-o", tmp_path / "keys", "--texts", tmp_path / "text", "--tokens", "500")
    assert result.exit_code == 0, result.output
    assert f'{{"tq_jax": {{"statistics": "{tmp_path / "keys"}"}}}}' in result.output
    assert (tmp_path / "keys").is_file() and not (model / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("expected fields of LlamaConfig in --overrides, got rope_fheta", ["--overrides", '{"rope_fheta": 5}']),
        ("expected a file or one of persuasion, pydoc, wiki, jargon, code, got 'nosuch'", ["--texts", "nosuch"]),
        ("expected a device that torch has, got 'nosuch'", ["--device", "nosuch"]),
        ("expected --overrides to be a JSON object, got 'x'", ["--overrides", "x"]),
        ("expected a file that can be written, in an existing folder, got /nosuch/keys", ["-o", "/nosuch/keys"]),
    ],
)
def test_misuse(model, message, arguments):
    result = run(model, "--tokens", "80", *arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("expected a file that can be written, in an existing folder, got no/keys", ["no-such-model", "no/keys"]),
        ("expected a text in UTF-8, got no-such-text", ["no-such-model", "keys", "--text", "no-such-text"]),
        ("error: ", [".", "keys"]),
        ("expected at least 32 tokens after the first 4 of each text, got texts of [9]", ["MODEL", "k", "--tokens=9"]),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_model_runs(model, tmp_path, monkeypatch, capsys, message, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["calibrate", *(str(model) if given == "MODEL" else given for given in arguments)])
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded")
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "keys").exists()


def test_a_run_with_a_file_to_write(model, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["calibrate", str(model), str(tmp_path / "keys"), "--tokens", "80"])
    main()
    assert tq.load_statistics(tmp_path / "keys")[0].any()


def test_what_is_no_model_is_refused(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 2 and "Unrecognized model in" in result.output


def test_a_cache_of_transformers_takes_the_file(model):
    """The statistics of every layer are the file's, also after a reset; without a file the cache refuses to start."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    network.set_attn_implementation(ATTENTION)
    with pytest.raises(FileNotFoundError, match=f"no key statistics of {model} were found .*tq-jax calibrate {model}$"):
        TurboQuantCache(network.config, statistics=True)
    calibrate(network, [torch.arange(5, 95)], model / FILE_NAME)
    mean, weight = tq.load_statistics(model / FILE_NAME)
    for statistics in (True, model / FILE_NAME):
        cache = TurboQuantCache(network.config, statistics=statistics)
        for _ in range(2):
            with torch.no_grad():
                network(torch.arange(20)[None], **{CACHE_ARGUMENT: cache})
            for layer, found in enumerate(cache.layers):
                held = found.cache.arrays.statistics
                assert held.ready.all() and np.array_equal(held.mean[0], mean[layer])
                assert np.array_equal(held.weight[0], weight[layer])
            cache.reset()
    network.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="{'layers': 3}, got {'layers': 2}"):
        TurboQuantCache(network.config, statistics=True)
