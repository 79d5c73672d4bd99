"""`tq-jax serve-bench`: how caches are named, and real engines in processes of their own."""

import dataclasses
import importlib.util
import json
import re
import time

import pytest

pytest.importorskip("torch")

import typer
from typer.testing import CliRunner

from interop.vllm.serve_bench.choices import DEFAULT, parse_choices
from interop.vllm.serve_bench.command import serve_bench
from interop.vllm.serve_bench.engine import Job
from interop.vllm.serve_bench.models import model_arguments
from interop.vllm.serve_bench.picture import draw
from interop.vllm.serve_bench.processes import run_engine
from tq_jax.commands.bench.model.shapes import SHAPES
from tq_jax.models.config_hf import config_from_hf

ENGINE = json.dumps({"dtype": "float32", "enforce_eager": True, "block_size": 32})
NAMED = {"op": "vllm", "backend": "tq_jax", "kv": "k4v4", "window": 128}


def run(*arguments):
    app = typer.Typer()
    app.command()(serve_bench)
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "2000"})


def test_names_of_caches():
    found = {choice.label: choice for choice in parse_choices(DEFAULT, {"seed": 3})}
    assert found["tq_jax k3v3"].arguments == {
        "kv_cache_dtype": "auto",
        "attention_backend": "CUSTOM",
        "additional_config": {"tq_jax": {"key_bits": 3, "value_bits": 3, "seed": 3}},
    }
    assert found["tq_jax k4v4"].fields == NAMED
    assert found["flash_attn bf16"].arguments == {"kv_cache_dtype": "auto", "attention_backend": "FLASH_ATTN"}
    assert found["flash_attn fp8"].arguments == {"kv_cache_dtype": "fp8", "attention_backend": "FLASH_ATTN"}
    assert found["turboquant 4bit_nc"].arguments == {"kv_cache_dtype": "turboquant_4bit_nc"}
    assert found["turboquant 4bit_nc"].attention == "TURBOQUANT"
    assert found["triton_attn int4_per_token_head"].attention == "TRITON_ATTN" and len(found) == 7
    (auto,) = parse_choices("auto:fp8", {})
    assert auto.attention is None and auto.arguments == {"kv_cache_dtype": "fp8"}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("expected a cache such as tq_jax:4/4, .*, got 'turboquant'", ["--caches", "turboquant"]),
        ("expected a cache such as tq_jax:4/4, .*, got 'flash attn'", ["--caches", "flash attn"]),
        ("expected key/value bits .*got '9/4'", ["--caches", "tq_jax:9/4"]),
        ("expected each cache once, got auto fp8 more than once", ["--caches", "auto:fp8,auto:fp8"]),
        ("expected tq_jax options among .* got \\['bits'\\]", ["--options", '{"bits": 4}']),
        ("expected --options to be a JSON object, got '\\[4\\]'", ["--options", "[4]"]),
        ("expected --arguments to be a JSON object, got 'x'", ["--arguments", "x"]),
        ("expected batches and contexts of at least 1, got '0' and '8192,32768'", ["--batch", "0"]),
        ("expected something to measure, got no --batch, --requests or --fit", ["--shape", "llama3-8b", "--batch", ""]),
        ("expected either --model or --shape, got --model None and --shape None", []),
        ("expected a shape among llama3-8b, .*, got 'huge'", ["--shape", "huge"]),
    ],
)
def test_misuse(message, arguments, monkeypatch):
    if importlib.util.find_spec("vllm") is None:  # what is refused before an engine starts needs no vLLM
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    result = run(*arguments)
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2
    assert re.search(message, said), said


def test_vllm_is_needed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("--shape", "llama3-8b")
    assert result.exit_code == 2 and 'pip install -e ".[vllm]" in a checkout' in result.output


def test_shapes_are_configurations(tmp_path):
    transformers = pytest.importorskip("transformers")
    given = model_arguments(None, "llama3-8b", tmp_path)
    assert given == {"model": str(tmp_path), "load_format": "dummy"}
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim) == (4096, 8, 128)
    assert config_from_hf(json.loads((tmp_path / "config.json").read_text())) == SHAPES["llama3-8b"]


def test_the_picture_takes_rows_with_errors(tmp_path):
    pytest.importorskip("matplotlib")
    row = NAMED | {"batch": 1, "context": 64, "decode_ms": 2.0, "kv_tokens": 512}
    rows = [row, row | {"context": 128}, row | {"window": 0, "batch": 8}, NAMED | {"error": "no", "batch": 1}]
    for name, drawn in (("some", rows), ("none", rows[3:])):
        draw(drawn, tmp_path / f"{name}.png", title="")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_an_engine_that_ends_without_a_word_is_an_error(tmp_path, monkeypatch):
    """Its last lines are the message."""
    (tmp_path / "ends.py").write_text("print('out of luck')\nraise SystemExit(3)")
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("interop.vllm.serve_bench.processes.GRACE", 1.0)
    job = Job({}, None, [], 8, 0, 1, 1, 1, deadline=time.time())
    said = []
    for module in ("ends", "sleeps"):
        monkeypatch.setattr("interop.vllm.serve_bench.processes.MODULE", module)
        said += run_engine(job, tmp_path / "log")
    assert said == [
        {"error": "exit code 3: out of luck"},
        {"error": "stopped, because the time of --limit was over"},
    ]
    assert time.time() < job.deadline + 60


@pytest.mark.slow
def test_caches_are_measured_in_real_engines(two_layers, tmp_path):
    """Ours and vLLM's own on a CPU; a backend that vLLM does not have there says so in every row."""
    pytest.importorskip("vllm")
    target, png = tmp_path / "rows.json", tmp_path / "picture.png"
    loads = ["--batch", "1,2", "--context", "64", "--output", "10", "--kv-gib", "0.004", "--arguments", ENGINE]
    served = ["--requests", "5", "--together", "2", "--request-input", "40", "--request-output", "8"]
    served += ["--fit", "400", "--fit-most", "12"]
    caches = ["--caches", "tq_jax:4/4,auto,flash_attn", "--options", '{"search": false}']
    files = ["--json", target, "--png", png, "--log", tmp_path / "log"]
    result = run("--model", two_layers, *caches, *loads, *served, *files)
    assert result.exit_code == 1, result.output
    report = json.loads(target.read_text())
    assert report["complete"] and report["versions"]["vllm"] and "cpu" in report["device"] and png.is_file()
    fits = {r["backend"]: r for r in report["rows"] if "fit" in r}
    rows = {(r["backend"], r.get("batch")): r for r in report["rows"] if "fit" not in r}
    backends = ("tq_jax", "auto", "flash_attn")
    assert len(report["rows"]) == 12 and set(rows) == {(b, n) for b in backends for n in (1, 2, None)}
    ours, full = rows["tq_jax", 2], rows["auto", 2]
    assert NAMED.items() <= ours.items() and (full["kv"], full["layers"]) == ("fp32", {"CPU_ATTN": 2})
    assert ours["layers"] == {"CUSTOM": 2} and ours["context"] == 64
    assert ours["kv_tokens"] / full["kv_tokens"] == pytest.approx(256 / 36, rel=0.05)
    for row in (ours, full, rows["tq_jax", 1], rows["auto", 1]):
        assert row["decode_steps"] >= 8 and 0 < row["decode_ms_min"] <= row["decode_ms"]
        assert row["prefill_s"] > 0 and row["start_s"] > 0
    for name in ("tq_jax", "auto"):
        row = rows[name, None]
        assert row["op"] == "vllm_throughput" and row["complete"] and row["finished"] == 5
        assert row["tokens_s"] == pytest.approx(5 * 8 / row["seconds"], rel=0.02)
        assert row["all_tokens_s"] == pytest.approx(5 * 48 / row["seconds"], rel=0.02)
    assert [fits[name]["batch"] for name in ("auto", "tq_jax")] == [9, 12]  # as many as fit; --fit-most
    for name in ("tq_jax", "auto"):
        row = fits[name]
        assert row["op"] == "vllm" and row["context"] == 400 and row["decode_steps"] >= 8
        assert row["decode_tokens_s"] == pytest.approx(1e3 * row["batch"] / row["decode_ms"], rel=0.01)
    assert "expected layers with attention FLASH_ATTN" in fits["flash_attn"]["error"]
    for batch in (1, 2, None):
        assert "expected layers with attention FLASH_ATTN, got {'CPU_ATTN': 2}" in rows["flash_attn", batch]["error"]


@pytest.mark.slow
def test_loads_that_do_not_fit_and_models_that_do_not_exist(two_layers, tmp_path):
    pytest.importorskip("vllm")
    target = tmp_path / "rows.json"
    options = ["--caches", "auto", "--context", "64,200", "--output", "8", "--log", tmp_path / "log", "--json", target]
    small = ["--batch", "1,8", "--kv-gib", "0.0006", "--arguments", ENGINE]
    cut = ["--requests", "3", "--request-input", "40", "--request-output", "8", "--served-s", "0", "--fit", "300"]
    result = run("--model", two_layers, *options, *small, *cut)
    assert result.exit_code == 1, result.output
    *rows, fit, served = json.loads(target.read_text())["rows"]
    assert (fit["batch"], fit["context"]) == (1, 300) and fit["decode_steps"] >= 7
    assert (served["requests"], served["finished"], served["complete"]) == (3, 0, False)
    rows = {(row["batch"], row["context"]): row for row in rows}
    assert "decode_ms" in rows[1, 64] and "decode_ms" in rows[1, 200]
    assert rows[8, 200]["error"].startswith("expected a cache of at least 1664 tokens for 8 requests, got ")
    result = run("--model", tmp_path / "nothing", *options, "--batch", "1")
    assert result.exit_code == 1
    rows = json.loads(target.read_text())["rows"]
    assert [row["context"] for row in rows] == [64, 200] and all("nothing" in row["error"] for row in rows)
    result = run("--model", two_layers, *options, "--batch", "1", "--limit", "0")
    rows = json.loads(target.read_text())["rows"]
    assert result.exit_code == 1 and {row["error"] for row in rows} == {"not measured: the time of --limit was over"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # by vLLM
def test_a_load_stops_when_the_time_is_over(two_layers):
    """Nothing is left in the engine, so that it can go on."""
    pytest.importorskip("vllm")
    from vllm.distributed import cleanup_dist_env_and_memory

    from interop.vllm.serve_bench.engine import Bench

    given = json.loads(ENGINE) | {"model": two_layers, "max_model_len": 128, "kv_cache_memory_bytes": 1 << 22}
    bench = Bench(Job(given, None, [], 8, 0, 1, 1, 1, deadline=time.time() + 600))
    try:
        bench.job = dataclasses.replace(bench.job, deadline=0.0)
        with pytest.raises(TimeoutError, match="the time of --limit was over"):
            bench.load(2, 64, 8)
        assert not bench.engine.has_unfinished_requests()
        bench.job = dataclasses.replace(bench.job, deadline=time.time() + 600)
        assert bench.load(2, 64, 8)["decode_steps"] >= 6
    finally:
        bench.engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
