"""`tq-jax calibrate` writes a file beside the model, and the engine finds and uses it."""

import shutil

import pytest

pytest.importorskip("vllm")

import typer
from typer.testing import CliRunner
from vllm_engines import greedy, own_answers, running

import tq_jax as tq
from interop.hf.calibrate_command import calibrate
from tq_jax.statistics_files import FILE_NAME

pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # by vLLM

OPTIONS = {"key_bits": 3, "search": False}
OWN = dict(key=tq.QuantizerSpec(32, 3), value=tq.QuantizerSpec(32, 4))


@pytest.fixture
def model(two_layers, tmp_path, monkeypatch):
    monkeypatch.setenv("TQ_JAX_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(two_layers, tmp_path / "model")


def run(*arguments):
    app = typer.Typer()
    app.command()(calibrate)
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "2000"})


def statistics_of(engine):
    def look(worker):
        layers = worker.vllm_config.compilation_config.static_forward_context.values()
        return [(layer.impl.statistics, layer.impl.statistics_from) for layer in layers]

    return engine.collective_rpc(look)[0]


def test_the_file_beside_the_model_is_used(model, tmp_path, prompts, said):
    """The tokens of our own cache with the same statistics; and vLLM does not take the file for weights."""
    (tmp_path / "text").write_text(" ".join(f"w{5 + i * i % 190}" for i in range(300)))
    result = run(model, "--texts", tmp_path / "text", "--tokens", "200")
    assert result.exit_code == 0, result.output
    beside = model / FILE_NAME
    assert beside.is_file() and "found automatically" in result.output
    with running(str(model), OPTIONS) as engine:
        found = greedy(engine, prompts)
        mean, weight = tq.load_statistics(beside)
        for layer, (given, source) in enumerate(statistics_of(engine)):
            assert source == str(beside)
            assert (given[0].numpy() == mean[layer]).all() and (given[1].numpy() == weight[layer]).all()
    assert found == own_answers(model, prompts, statistics=beside, **OWN)
    assert found != own_answers(model, prompts, **OWN)
    assert any(f"keys centred and weighted by {beside}" in message for message in said)
    assert not any("no key statistics" in message for message in said)


def test_an_engine_without_statistics_says_so(model, said):
    with running(str(model), OPTIONS) as engine:
        assert statistics_of(engine) == [(None, None)] * 2
    (warning,) = {message for message in said if "no key statistics" in message}
    assert f"at {model / FILE_NAME} or {model.parent / 'cache'}" in warning
    assert "nats instead of" in warning and warning.endswith(f"tq-jax calibrate {model}")


def test_an_engine_refuses_the_statistics_of_another_model(model, four_layers, prompts):
    run(four_layers, "-o", model / FILE_NAME, "--texts", "persuasion", "--tokens", "100")
    with (
        pytest.raises(ValueError, match=f"{FILE_NAME}: expected .* {{'layers': 2}}, got {{'layers': 4}}"),
        running(str(model), OPTIONS),
    ):
        pass
