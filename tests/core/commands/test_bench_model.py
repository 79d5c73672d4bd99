"""`tq-jax bench model` on a CPU: a tiny decoder runs for real; plans, floors, claims and fits are judged on numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import typer
from flax import nnx
from typer.testing import CliRunner

from tq_jax.commands import cli, inputs
from tq_jax.commands.bench import command, timing
from tq_jax.commands.bench.job import Setting
from tq_jax.commands.bench.model import (
    caches,
    claims,
    fit,
    floors,
    lab,
    line,
    many,
    picture,
    placement,
    plan,
    report,
    shapes,
)
from tq_jax.commands.bench.model.caches import Kind
from tq_jax.models import Decoder, DecoderConfig

TINY = DecoderConfig(
    vocab_size=97, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, ffn_dim=96, max_context=1024
)
K4V4 = Kind((4, 4))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A tiny decoder among the shapes, and quick measurements of the device."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(timing, "ITERATIONS", 1)
    monkeypatch.setitem(command.COPY_BYTES, False, 2**20)
    monkeypatch.setitem(command.MATRIX, False, 64)


@pytest.fixture(scope="module")
def tiny():
    """The tiny decoder, made once."""
    return shapes.random_decoder(TINY, jnp.float32)


@pytest.fixture
def made_once(monkeypatch, tiny):
    """Lets commands take the tiny decoder that there is."""
    monkeypatch.setattr(lab, "random_decoder", lambda config, dtype, *, layout: tiny)


def run(*arguments):
    application = cli.build(["bench"])
    return CliRunner().invoke(application, ["bench", *arguments], catch_exceptions=False, env={"COLUMNS": "2000"})


def row_of(shape="tiny", batch=1, seq=1024, bits=4, us=1000.0, **fields):
    stored = f"mse{bits}" if bits else "bf16"
    row = {"op": "model", "shape": shape, "batch": batch, "seq": seq, "key": stored, "value": stored, "us": us}
    return row | {"floor_us": us / 2, "impl": "triton"} | fields


@pytest.mark.slow
def test_tokens_and_prompts_are_timed(tmp_path):
    path, drawn = tmp_path / "model.json", tmp_path / "model.png"
    result = run(
        *("model", "--shape", "tiny", "--context", "256,384", "--cache", "bf16", "--prompt", "256"),
        *("--steps", "4", "--json", str(path), "--png", str(drawn)),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert {"device", "versions", "commit", "copy_gbps", "matmul_tflops"} <= found.keys()
    prompt, *rows = found["rows"]
    assert [(row["op"], row["shape"], row["batch"], row["seq"], row["key"], row["value"]) for row in rows] == [
        ("model", "tiny", 1, seq, "bf16", "bf16") for seq in (256, 384)
    ]
    for row in rows:
        assert row["us"] > 0
        assert row["tokens_per_s"] == pytest.approx(1e6 / row["us"], rel=1e-2)
        assert row["floor_us"] == pytest.approx(row["bytes"] / found["copy_gbps"] / 1e3, abs=0.01)
        assert row["read_weights_bytes"] == row["weights_bytes"] - 97 * 64 * 4  # the head is not tied
        assert row["bytes"] == row["read_weights_bytes"] + row["read_cache_bytes"]
        assert row["compile_s"] > 0
    # Four steps end at 256 tokens, so they attend to 254.5 on average, in two layers.
    assert rows[0]["read_cache_bytes"] == 2 * 254.5 * 2 * 2 * 32 * 2
    assert (prompt["op"], prompt["shape"], prompt["batch"], prompt["seq"]) == ("prompt", "tiny", 1, 256)
    assert prompt["s"] > 0
    assert prompt["over_floor"] == pytest.approx(prompt["s"] / prompt["floor_s"], rel=1e-2, abs=1e-3)  # three decimals
    assert [(row["key"], row["contexts"]) for row in found["lines"]] == [("bf16", [256, 384])]
    assert found["claims"] == [] == found["fit"] == found["published_lines"]
    assert "does not say how much it holds" in result.output
    assert "tiny" in result.output
    assert "tokens/s" in result.output
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compressed_caches_of_any_capacity_are_filled_by_a_prompt(tmp_path, made_once):
    path = tmp_path / "model.json"
    result = run(
        *("model", "--shape", "tiny", "--batch", "2", "--context", "256", "--cache", "K4V4", "--fill", "prompt"),
        *("--steps", "2", "--capacity", "300", "--json", str(path)),
    )
    assert result.exit_code == 0, result.output
    [row] = json.loads(path.read_text())["rows"]
    assert (row["key"], row["batch"], row["capacity"]) == ("mse4", 2, 300)
    assert row["cache_bytes"] == K4V4.nbytes(TINY, 300, 2)
    assert row["read_cache_bytes"] == K4V4.read_bytes(TINY, 255.5, 2)


@pytest.mark.sampled
@pytest.mark.parametrize("mesh", ["heads=2", "sequence=2", "heads=2,sequence=2"])
def test_devices_share_a_decoder(tmp_path, monkeypatch, tiny, mesh):
    """The loop, a prompt and a long prompt run on a mesh; the bytes of a row are those of one device."""
    monkeypatch.setattr(lab, "PROMPT_CHUNK", 256)
    path = tmp_path / "model.json"
    result = run(
        *("model", "--shape", "tiny", "--batch", "2", "--context", "320", "--cache", "K4V4", "--prompt", "256,300"),
        *("--steps", "4", "--mesh", mesh, "--json", str(path)),
    )
    assert result.exit_code == 0, result.output
    sizes = {name: int(size) for name, _, size in (part.partition("=") for part in mesh.split(","))}
    *prompts, row = json.loads(path.read_text())["rows"]
    heads, devices = sizes.get("heads", 1), sizes.get("heads", 1) * sizes.get("sequence", 1)
    assert [one["mesh"] for one in (*prompts, row)] == [sizes] * 3
    norms = 4 * (2 * 2 + 1) * 64
    table = 4 * 97 * 64  # 97 rows of the vocabulary are on every device
    assert row["weights_bytes"] - norms - 2 * table == 4 * floors.layer_weights(TINY) // heads
    assert row["read_cache_bytes"] == round(K4V4.read_bytes(TINY, 318.5, 2) / devices)
    assert [one["op"] for one in prompts] == ["prompt"] * 2
    assert prompts[0]["floor_s"] == pytest.approx(
        prompts[0]["operations"] / devices / json.loads(path.read_text())["matmul_tflops"] / 1e12, rel=1e-2
    )


def test_meshes_that_do_not_fit_are_refused():
    for mesh, words in {
        "heads": "like heads=2",
        "rows=2": "like heads=2",
        "heads=2,heads=2": "like heads=2",
        "heads=0": "like heads=2",
        "heads=64": f"at most {jax.device_count()} devices",
    }.items():
        with pytest.raises(typer.BadParameter, match=words):
            plan.make_plan(plan.Asked(shape="tiny", mesh=mesh), gpu=False)
    with pytest.raises(typer.BadParameter, match="--many on one device"):
        plan.make_plan(plan.Asked(shape="tiny", mesh="heads=2", many=4), gpu=False)


def test_claims_are_of_one_device():
    rows = [row_of("llama3-8b", 1, 1024, us=4000.0, mesh={"heads": 2})]
    assert claims.measure(rows, "NVIDIA H200")[0] == []


def test_what_fits_on_several_devices():
    row = row_of(weights_bytes=100, overhead_bytes=0, cache_bytes=1)
    limit = 100 + K4V4.nbytes(TINY, 1024, 3)
    one, two = (fit.compute([row], {"tiny": TINY}, [K4V4], limit, devices=n)[0] for n in (1, 2))
    assert (one["batch"], two["batch"]) == (3, 6)


@pytest.mark.slow
def test_many_prompts_are_compared_with_a_full_batch(tmp_path, monkeypatch, made_once):
    for name, value in (("PROMPTS", 5), ("PROMPT_TOKENS", (4, 16)), ("NEW_TOKENS", (8, 16))):
        monkeypatch.setattr(many, name, value)
    path = tmp_path / "model.json"
    asked = "model", "--shape", "tiny", "--context", "256", "--cache", "bf16", "--steps", "2", "--many", "2"
    result = run(*asked, "--json", str(path))
    assert result.exit_code == 0, result.output
    row = json.loads(path.read_text())["rows"][1]
    assert (row["op"], row["batch"], row["prompts"], row["key"]) == ("many", 2, 5, "bf16")
    assert 5 * 8 <= row["new_tokens"] <= 5 * 16
    assert 0.5 < row["used_rows"] <= 1
    assert row["over_full"] == pytest.approx((row["full_s"] + row["prompt_s"]) / row["s"], rel=0.01)
    assert "Many mixed prompts" in result.output


@pytest.mark.slow
def test_what_is_computed_to_fit_is_tried(tmp_path, monkeypatch, made_once):
    limit = 4_000_000
    monkeypatch.setattr(lab, "memory_stats", lambda: {"bytes_limit": limit, "peak_bytes_in_use": 0})
    path = tmp_path / "model.json"
    result = run(
        *("model", "--shape", "tiny", "--context", "256", "--cache", "bf16", "--steps", "2"),
        *("--check-fit", "--json", str(path)),
    )
    assert result.exit_code == 0, result.output
    row, batch, context = (found := json.loads(path.read_text()))["rows"]
    [fits] = found["fit"]
    assert fits["computed"]
    assert fits["room_bytes"] == limit - row["weights_bytes"] - row["overhead_bytes"]
    assert [(r["op"], r["batch"], r["seq"], r["fits"]) for r in (batch, context)] == [
        ("fit", fits["batch"], 256, True),
        ("fit", 1, fits["context"], True),
    ]
    assert "What fits, computed from measured memory" in result.output


def test_a_failing_measurement_is_a_row_and_stops_nothing(tmp_path, monkeypatch, made_once):
    path = tmp_path / "model.json"
    real = placement.decode_loop

    class Full:
        """A loop that has no room for two sequences."""

        @staticmethod
        def lower(decoder, *, first, **options):
            if first.shape == (2,):
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 34359738368 bytes.")
            if first.shape == (3,):
                raise NotImplementedError("no kernel")
            return real.lower(decoder, first=first, **options)

    monkeypatch.setattr(placement, "decode_loop", Full)
    asked = ("model", "--shape", "tiny", "--context", "256", "--cache", "bf16", "--steps", "2", "--json", str(path))
    result = run(*asked, "--batch", "2,1")
    assert result.exit_code == 0, result.output
    full, good = json.loads(path.read_text())["rows"]
    assert full["error"] == "out of memory: 34359738368 bytes could not be allocated"
    assert "us" not in full
    assert good["us"] > 0
    assert "not measured: out of memory" in result.output
    result = run(*asked, "--batch", "3")
    assert result.exit_code == 1
    found = json.loads(path.read_text())
    assert [failure["error"] for failure in found["failed"]] == ["NotImplementedError: no kernel"]


def test_a_time_limit_says_what_was_left_out(tmp_path):
    path = tmp_path / "model.json"
    result = run("model", "--shape", "tiny", "--limit", "0", "--json", str(path), "--png", str(tmp_path / "model.png"))
    assert result.exit_code == 1  # nothing was measured
    assert "did not start in time: prompt tiny 1 x 1024, K4/V4; model tiny 1 x 256, bf16; " in result.output
    assert len(json.loads(path.read_text())["skipped"]) == 7
    assert not (tmp_path / "model.png").exists()


MISTAKES = {
    "expected shapes among llama3-8b": ("--shape", "llama9"),
    "expected --shape or --model, got both": ("--shape", "tiny", "--model", "x"),
    "expected --context of 256 to 1048576 tokens, got '100'": ("--context", "100"),
    "expected --context of 256 to 1048576 tokens, got '256,1048577'": ("--context", "256,1048577"),
    "expected comma-separated numbers of at least 0, got 'long'": ("--context", "long"),
    "expected --batch of at least 1, got '8,0'": ("--batch", "8,0"),
    "expected --prompt of 256 to 1048576 tokens, got '1'": ("--prompt", "1"),
    "expected caches like bf16,K4V4 with bits of 1, 2, 2.5": ("--cache", "bf16,K4"),
    "with bits of 1, 2, 2.5, 3, 3.5, 4, 5, 8, got 'K6V4'": ("--cache", "K6V4"),
    "got 'K4.4.4V4'": ("--cache", "K4.4.4V4"),
    "expected --fill among random, prompt, got 'zeros'": ("--fill", "zeros"),
    "expected --capacity with --context of at most so many tokens, got 300": ("--context", "512", "--capacity", "300"),
    "Invalid value for '--steps'": ("--steps", "1"),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_are_refused_before_any_work(sentence, monkeypatch):
    monkeypatch.setattr(command, "make_setting", None)
    result = run("model", *MISTAKES[sentence])
    assert result.exit_code == 2
    assert sentence in result.output


def test_options_of_models_are_refused_without_the_operation():
    result = run("decode", "--context", "256", "--check-fit")
    assert result.exit_code == 2
    assert "expected --context, --check-fit with the operation model, got operations decode" in result.output


def test_a_model_that_cannot_be_had_is_said_once(monkeypatch):
    def fail(path, dtype):
        raise ConnectionError("no such model")

    monkeypatch.setattr(inputs, "load_model", fail)
    result = run("model", "--model", "folder")
    assert result.exit_code == 2
    assert result.output.count("no such model") == 1


def test_a_model_of_a_file_is_measured(decoder, monkeypatch):
    class Loaded:
        """A language model without a tokenizer."""

        def __init__(self):
            self.decoder = decoder

    monkeypatch.setattr(plan, "open_model", lambda name, dtype: Loaded())
    made = plan.make_plan(plan.Asked(model="/models/mine.gguf", context="256", cache="bf16"), gpu=False)
    assert [task.label for task in made.tasks] == ["model mine 1 x 256, bf16"]
    assert lab.Lab(Setting(gpu=False, copy_gbps=1.0, matmul_tflops=1.0), made).decoder("mine") is decoder


def test_plans_by_default_have_the_rows_of_all_claims():
    made = plan.make_plan(plan.Asked(), gpu=True)
    rows = [task.as_dict() | {"us": 1.0, "s": 1.0, "over_full": 1.0} for task in made.tasks]
    assert claims.measure(rows, "NVIDIA H200")[1] == []
    assert made.dtype == "bfloat16"
    loads = [task for task in made.tasks if task.op == "model" and task.shape == "llama3-8b"]
    assert len({task.seq for task in loads if task.batch == 1}) >= 3  # a line
    small = plan.make_plan(plan.Asked(), gpu=False)
    assert list(small.configs) == ["smollm2"]


def test_contexts_and_batches_are_combined_and_prompts_only_asked_for():
    asked = plan.Asked(shape="tiny,smollm2", context="256,512", batch="1,4", cache="K8V4,K2V2")
    made = plan.make_plan(asked, gpu=True)
    assert len(made.tasks) == 2 * 2 * 2 * 2
    assert {task.op for task in made.tasks} == {"model"}
    made = plan.make_plan(plan.Asked(shape="tiny", batch="2", prompt="256,512", cache="K2V2,K4V4"), gpu=False)
    prompts = [task.label for task in made.tasks if task.op == "prompt"]
    assert prompts == ["prompt tiny 2 x 256, K4/V4", "prompt tiny 2 x 512, K4/V4"]
    assert not [t for t in plan.make_plan(plan.Asked(prompt="none"), gpu=True).tasks if t.op == "prompt"]


def test_random_weights_are_of_one_type_and_of_use():
    decoder = shapes.random_decoder(TINY, jnp.bfloat16)
    assert isinstance(decoder, Decoder)
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder)} == {jnp.dtype(jnp.bfloat16)}
    assert bool(jnp.all(decoder.norm.scale[...] == 1))
    logits = decoder.logits(decoder.forward(jnp.arange(8, dtype=jnp.int32)[None]))
    assert 0.3 < float(jnp.std(logits)) < 3.0


def test_a_step_reads_all_weights_but_an_embedding_that_is_no_head(tiny):
    table, norms = 97 * 64, (2 * 2 + 1) * 64
    assert floors.read_weights(tiny) == floors.all_weights(tiny) - 4 * table
    assert floors.all_weights(tiny) == 4 * (floors.layer_weights(TINY) + 2 * table + norms)


def test_of_a_mixture_a_step_reads_the_experts_of_one_token():
    config = dataclasses.replace(TINY, architecture="mixtral", num_experts=8, experts_per_token=3)
    mixed = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    expert = 3 * config.dim * config.ffn_dim
    assert floors.all_weights(mixed) - floors.read_weights(mixed) == 4 * (97 * 64 + config.num_layers * 5 * expert)
    more = config.num_layers * (2 * expert + config.dim * 8)
    assert floors.layer_weights(config) - floors.layer_weights(TINY) == more


def test_a_step_reads_tokens_in_use():
    exact, packed = 2 * 2 * 32 * 2, K4V4.spec(TINY, 1024).bytes_per_token()
    assert Kind().read_bytes(TINY, 1000, batch=3) == 3 * 2 * 1000 * exact
    assert K4V4.read_bytes(TINY, 100, batch=1) == 2 * 100 * exact
    assert K4V4.read_bytes(TINY, 1000, batch=3) == 3 * 2 * (132 * exact + 868 * packed)
    sliding = DecoderConfig(
        vocab_size=97, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, ffn_dim=96,
        sliding_window=500, local_layers=(True, False),
    )  # fmt: skip
    local, whole = 128 * exact + 372 * packed, 132 * exact + 868 * packed
    assert K4V4.read_bytes(sliding, 1000, batch=1) == local + whole
    pairs = 500 * 501 // 2 + 500 * 500 + 1000 * 1001 // 2
    assert floors.prompt_operations(sliding, 1000, 2) == 2 * (
        2 * floors.layer_weights(sliding) * 1000 + 4 * pairs * 4 * 32 + 2 * 97 * 64
    )


def test_kinds_are_parsed_like_bits():
    assert [kind.label for kind in caches.parse_kinds("BF16,k3.5v2,K8/V4,bf16")] == ["bf16", "K3.5/V2", "K8/V4"]
    with pytest.raises(typer.BadParameter):
        caches.parse_kinds("")


def test_filling_appends_in_chunks(monkeypatch, tiny):
    monkeypatch.setattr(lab, "CHUNK_TOKENS", 96)
    made = plan.make_plan(plan.Asked(shape="tiny"), gpu=False)
    bench = lab.Lab(Setting(gpu=False, copy_gbps=1.0, matmul_tflops=1.0), made)
    cache = tiny.init_cache(K4V4.spec(TINY, 256), batch=2)
    cache = bench._filled(tiny, cache, plan.Task("model", "tiny", 2, 256, K4V4), 250)
    assert cache.length.tolist() == [250] * 4
    assert cache.compressed.tolist() == [250 - 132] * 4


def test_lines_are_of_least_squares():
    assert line.least_squares([(1, 1.0)]) is None
    assert line.least_squares([(1, 1.0), (1, 2.0)]) is None
    fitted = line.least_squares([(0, 1.0), (10, 3.0), (20, 2.0)])
    assert fitted is not None
    assert (fitted.intercept_ms, fitted.slope_ms) == pytest.approx((1.5, 0.05))
    rows = [row_of(seq=seq, us=5000.0 + seq / 10) for seq in (256, 1024, 8192)]
    rows += [row_of(seq=9999, batch=2), row_of(seq=512, bits=2), {**row_of(seq=300), "op": "fit"}]
    failed = row_of(seq=131072)
    del failed["us"]
    [found] = line.fit_lines([*rows, failed])
    assert (found["key"], found["contexts"]) == ("mse4", [256, 1024, 8192])
    assert (found["intercept_ms"], found["slope_ms"]) == pytest.approx((5.0, 1e-4))
    assert found["floor"]["intercept_ms"] == pytest.approx(2.5)


def test_lines_of_vllm_are_scaled_by_bandwidth():
    assert [found["scaled_to"] for found in line.published_lines("NVIDIA H100 80GB HBM3")] == [None, None]
    published, _, scaled, _ = line.published_lines("NVIDIA H200")
    assert (published["intercept_ms"], published["slope_ms"]) == (6.44, 4.37e-5)
    assert (scaled["intercept_ms"], scaled["slope_ms"]) == pytest.approx((4.49, 3.05e-5), rel=2e-3)


def test_fits_are_computed_from_the_largest_load():
    sizes = {"weights_bytes": 1_000_000, "overhead_bytes": 10, "cache_bytes": 1}
    rows = [
        row_of(seq=1024, **sizes),
        row_of(seq=512, batch=8, **sizes | {"cache_bytes": 2, "overhead_bytes": 500_000}),
    ]
    [found] = fit.compute(rows, {"tiny": TINY}, [Kind(), K4V4], 4_000_000)
    assert (found["key"], found["overhead_bytes"], found["room_bytes"]) == ("mse4", 500_000, 2_500_000)
    assert found["batch_seq"] == 1024
    assert K4V4.nbytes(TINY, 1024, found["batch"]) <= 2_500_000 < K4V4.nbytes(TINY, 1024, found["batch"] + 1)
    assert found["context"] % fit.STEP_TOKENS == 0
    [none] = fit.compute(rows, {"tiny": TINY}, [K4V4], 1_000_000)
    assert (none["batch"], none["context"]) == (0, 0)


def claimed_rows(factor):
    """Rows of every claim of an H200, each `factor` times its bound; a bfloat16 cache takes three times as long."""
    rows = []
    for claim in claims.CLAIMS["H200"]:
        if isinstance(claim, claims.Limit):
            worse = factor if claim.relation == "<=" else 1 / factor
            rows.append(claim.fields | {claim.figure: worse * claim.bound * claim.unit})
    rows.append(row_of("llama3-8b", 8, 32768, None, us=2.8 * 7400.0))
    rows += [row_of("smollm2", 1, 8192, None, us=1000.0), row_of("smollm2", 1, 8192, 4, us=factor * 1000.0)]
    return rows


def test_claims_hold_and_fail_on_their_device_only():
    held, missing = claims.measure(claimed_rows(0.99), "NVIDIA H200")
    assert (len(held), missing) == (11, [])
    assert all(claim.ok for claim in held)
    failed, _ = claims.measure(claimed_rows(1.4), "NVIDIA H200")
    assert not any(claim.ok for claim in failed)
    assert claims.measure(claimed_rows(0.99), "NVIDIA H100") == ([], [])
    rows = [row | {"error": "out of memory"} for row in claimed_rows(0.99)]
    assert len(claims.measure(rows, "NVIDIA H200")[1]) == 11


@pytest.mark.parametrize(("us", "ok"), [(4600.0, True), (4800.0, False)])
def test_a_missed_claim_fails_the_command(us, ok):
    made = plan.make_plan(plan.Asked(shape="llama3-8b"), gpu=True)
    data = {"rows": [row_of("llama3-8b", 1, 1024, 4, us=us, **ROW)], "failed": [], "skipped": []}
    data["device"] = "NVIDIA H200, x86_64, 16 CPU cores"
    command.conclude(data, gpu=True, console=command.open_console("-"), plan=made)
    assert data["ok"] == ok
    assert [claim["ok"] for claim in data["claims"]] == [ok]
    assert len(data["not_measured"]) == 10
    assert len(data["published_lines"]) == 2


ROW = {"over_floor": 2.0, "tokens_per_s": 1.0, "cache_bytes": 10, "compile_s": 1.0}


def test_tables_and_pictures_take_rows_of_every_kind(tmp_path):
    rows = [
        row_of("llama3-8b", batch, seq, bits, **ROW)
        for batch, seq in ((1, 256), (1, 1024), (8, 512))
        for bits in (0, 4)
    ]
    rows += [row_of("smollm2", 1, 256, 4, **ROW), row_of("tiny", 1, 256, 4, **ROW) | {"op": "fit", "fits": True}]
    prompt = {"op": "prompt", "shape": "tiny", "batch": 1, "seq": 256, "key": "mse4", "value": "mse4"}
    rows += [prompt | {"s": 1.0, "floor_s": 0.5, "over_floor": 2.0, "tokens_per_s": 256.0, "compile_s": 1.0}]
    many_rows = prompt | {"op": "many", "prompts": 200, "over_full": 0.9, "used_rows": 0.95, "tokens_per_s": 2500.0}
    rows += [many_rows | {"compile_s": 1.0}, many_rows | {"error": "out of memory"}]
    rows += [
        prompt | lab.explain(MemoryError()),
        rows[0] | lab.explain(ValueError("odd")) | {"op": "fit", "fits": None},
    ]
    published = line.published_lines("NVIDIA H200")
    path = tmp_path / "model.svg"
    picture.draw([row for row in rows if "error" not in row], published, path, title="a device")
    text = path.read_text()
    assert text.count('<g id="axes_') == 3  # a curve and bars of llama3-8b, bars of smollm2
    assert report.tokens_table(rows, "title").row_count == 9
    assert report.prompts_table(rows).row_count == 2
    lines = {"lines": line.fit_lines(rows[:6]), "published_lines": published}
    assert report.lines_table(lines).row_count == 2 + 4


def test_kernels_and_models_have_pictures_of_their_own(tmp_path):
    kernel = {"op": "decode", "impl": "triton", "key": "mse4", "value": "mse4", "batch": 1, "seq": 64, "us": 2.0}
    data = {"rows": [kernel | {"bytes": 10**6}, row_of(**ROW)], "device": "a device", "published_lines": []}
    setting = Setting(gpu=False, copy_gbps=1.0, matmul_tflops=1.0)
    command.draw(data, tmp_path / "bench.png", setting, command.open_console("-"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.png", "bench_model.png"]


def test_whole_models_alone_get_nearly_all_memory(monkeypatch):
    names = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"
    environment: dict[str, str] = {}
    monkeypatch.setattr(command.os, "environ", environment)
    command.set_memory(["model"])
    assert environment == {names[0]: command.WHOLE_FRACTION}
    command.set_memory(["model", "decode"])
    assert environment[names[1]] == "false"
