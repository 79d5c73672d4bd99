"""`tq-jax bench` without a GPU: rows of the reference, and claims judged on given rows."""

import dataclasses
import json
from collections import Counter

import jax
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from typer.testing import CliRunner

from pallas_kernels.attention import Partial
from pallas_kernels.attention.decode import launch_triton as decode_kernel
from pallas_kernels.attention.prefill import launch_triton as prefill_kernel
from pallas_kernels.encode import launch_triton as encode_kernel
from pallas_kernels.pages import empty_pages
from tq_jax.commands import cli
from tq_jax.commands.bench import claims, command, decode, encode, paged, prefill, roofline, timing
from tq_jax.commands.bench.job import Job, Setting
from tq_jax.commands.bench.peers import PEERS
from tq_jax.commands.bench.shapes import DECODE, SMALL
from tq_jax.quantizer import encoder, make_quantizer

CASES = {"decode": list(decode.cases()), "prefill": list(prefill.cases())}


def run(*arguments, env=None):
    return CliRunner().invoke(cli.build(["bench"]), ["bench", *arguments], catch_exceptions=False, env=env)


@pytest.mark.slow
def test_without_a_gpu_small_shapes_run_and_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "ITERATIONS", 1)
    monkeypatch.setitem(command.COPY_BYTES, False, 2**20)
    monkeypatch.setitem(command.MATRIX, False, 64)
    path, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = run("--only", "mse4", "--json", str(path), "--png", str(picture))
    assert result.exit_code == 0, result.output
    assert "peers and claims are not measured" in result.output
    assert "Wall-clock time per call on cpu, in microseconds" in result.output
    assert "cuDNN" not in result.output
    found = json.loads(path.read_text())
    assert {"device", "versions", "commit", "copy_gbps", "rows"} <= found.keys()
    assert found["claims"] == [] == found["failed"]
    assert [row["op"] for row in found["rows"]] == ["decode", "attend", "encode", "prefill"]
    for row in found["rows"]:
        assert (row["impl"], row["key"], row["value"]) == ("reference", "mse4", "mse4")
        assert row["us"] > 0
    decoded, _, encoded, _ = found["rows"]
    shape = SMALL["decode"]
    assert (decoded["batch"], decoded["seq"], decoded["paged"]) == (shape.batch, shape.seq, True)
    assert decoded["bytes"] == shape.batch * shape.seq * shape.kv_heads * 2 * (64 + 2)
    assert encoded["bytes"] == 2 * 256 * 2 * (2 * 128 + 64 + 2)
    assert encoded["floor_us"] == pytest.approx(encoded["bytes"] / found["copy_gbps"] / 1e3, abs=0.01)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_search_finds_what_exact_products_of_its_codes_find(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "ITERATIONS", 1)
    monkeypatch.setitem(command.COPY_BYTES, False, 2**20)
    monkeypatch.setitem(command.MATRIX, False, 64)
    path = tmp_path / "bench.json"
    result = run("search", "--json", str(path), "--png", str(tmp_path / "bench.png"))
    assert result.exit_code == 0, result.output
    two, four, exact = json.loads(path.read_text())["rows"]
    assert [row["bytes"] for row in (two, four, exact)] == [4096 * 20, 4096 * 36, 4096 * 128]
    assert two["ok"] and four["ok"]
    assert four["faster_than"].keys() == {"float16"}
    assert four["queries_per_second"] == pytest.approx(64e6 / four["us"], rel=1e-3)


def test_unknown_operations_and_peers_are_refused():
    result = run("decoding")
    assert result.exit_code == 2
    assert "expected operations among decode" in result.output
    assert run("decode", "--against", "cublas").exit_code == 2
    assert run("").exit_code == 2


def test_a_label_that_no_measurement_has_is_refused(monkeypatch):
    monkeypatch.setitem(command.COPY_BYTES, False, 2**20)
    monkeypatch.setitem(command.MATRIX, False, 64)
    result = run("decode", "--only", "mse9", env={"COLUMNS": "2000"})
    assert result.exit_code == 2
    assert "expected a part of a label such as decode 2 x 512, mse4/mse4; " in result.output


@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op} {case.label}") for op in CASES for case in CASES[op]]
)
def test_the_kernels_take_every_measured_case(op, case):
    key, value = (spec.format for spec in case.specs)
    shape = case.shape
    pages = jax.eval_shape(lambda: empty_pages(16, shape.kv_heads, case.page_size, key, value))
    check = {"decode": decode_kernel, "prefill": prefill_kernel}[op].check_supported
    check((shape.batch, shape.q_len, shape.q_heads, shape.head_dim), pages, key, value, None)


@pytest.mark.parametrize("case", list(encode.cases()), ids=lambda case: case.label)
def test_the_encoder_takes_every_measured_case(case):
    key, value = case.specs
    pages = jax.eval_shape(lambda: empty_pages(4, 1, case.page_size, key.format, value.format))
    encode_kernel.check_supported(pages, encoder(make_quantizer(key)), encoder(make_quantizer(value)))


def rows_for(ours: float, fp8: float = 100.0):
    """Rows of every measured case: this project takes `ours` microseconds, cuDNN 100 and 120."""
    rows = []
    for op, cases in CASES.items():
        for shape in dict.fromkeys(case.shape for case in cases):
            for impl, us in (("cudnn_bf16", 120.0), ("jax_cudnn_bf16", 100.0), ("flashinfer_fp8", fp8)):
                rows.append({"op": op, "impl": impl, "us": us, "bytes": 4.0, **shape.as_dict()})
        for case in cases:
            row = {"op": op, "impl": "triton", "us": ours, "bytes": ours / 25.0, **case.shape.as_dict()}
            rows.append(row | {"key": case.names[0], "value": case.names[1], "paged": case.paged})
    for case in encode.cases():
        row = {"op": "encode", "impl": "triton", "us": ours, "floor_us": 20.0, "vectors": case.vectors}
        rows.append(row | {"key": "mse4", "value": "mse4", "search": case.search, "batch": case.batch})
    return rows


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_all_claims_can_be_measured_hold_and_fail(device):
    fast, missing = claims.measure(rows_for(25.0), device)
    assert not missing
    assert all(claim.ok for claim in fast)
    slow, _ = claims.measure(rows_for(60.0, fp8=60.0), device)
    # Shuffled pages and several queries are compared with the kernel itself.
    held = ("time of", "min-max 2", "time over cuDNN")
    assert {claim.name for claim in slow if claim.ok} == {
        claim.name for claim in slow if any(words in claim.name for words in held)
    }
    faster = next(claim for claim in fast if "K4/V4: times faster than cuDNN" in claim.name)
    assert faster.figure == pytest.approx(4.0)


def test_claims_without_rows_are_not_measured():
    measured, missing = claims.measure([], "NVIDIA H200")
    assert measured == []
    assert len(missing) == len(claims.claims_for("NVIDIA H200"))


def test_rows_say_how_many_times_faster_than_peers_they_are():
    rows = rows_for(50.0)
    claims.add_ratios(rows)
    own = [row for row in rows if row["impl"] == "triton" and row["op"] == "decode"]
    assert own[0]["faster_than"] == {"cudnn_bf16": 2.4, "jax_cudnn_bf16": 2.0, "flashinfer_fp8": 2.0}


def test_columns_of_peers_that_were_not_measured_are_left_out():
    rows = rows_for(50.0)
    claims.add_ratios(rows)
    names = [column.header for column in command.make_table(rows, gpu=True).columns]
    assert names == ["op", "impl", "shape", "codes", "us", "floor", "of floor", "cuDNN", "FlashInfer fp8"]
    table = command.make_table([row for row in rows if row["impl"] == "cudnn_bf16"], gpu=True)
    assert [column.header for column in table.columns] == ["op", "impl", "shape", "us"]
    assert str(table.title).startswith("GPU time per call on")


def broken():
    """A job that fails."""
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(("peer", "ok"), [(True, True), (False, False)])
def test_a_failed_job_ends_nothing_but_itself(peer, ok):
    console = command.open_console("-")
    data = {"rows": [], "failed": [], "skipped": [], "device": "NVIDIA H100 80GB HBM3"}
    command.run("decode", Job("broken", broken, peer=peer), data, console)
    good = {"op": "decode", "impl": "triton", "key": "mse4", "value": "mse4", "batch": 1, "us": 2.0, "floor_us": 1.0}
    command.run("decode", Job("good", lambda: iter([good])), data, console)
    assert [failure["error"] for failure in data["failed"]] == ["RuntimeError('out of memory')"]
    command.conclude(data, gpu=True, console=console)
    assert data["ok"] == ok


def test_a_wrong_result_fails():
    data = {"rows": [], "failed": [], "skipped": [], "device": "NVIDIA H100 80GB HBM3"}
    wrong = {"op": "decode", "impl": "triton", "key": "mse4", "value": "mse4", "us": 2.0, "ok": False, "error": 0.5}
    data["rows"].append(wrong)
    command.conclude(data, gpu=True, console=command.open_console("-"))
    assert not data["ok"]


def test_a_time_limit_skips_what_has_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "ITERATIONS", 1)
    monkeypatch.setitem(command.COPY_BYTES, False, 2**20)
    monkeypatch.setitem(command.MATRIX, False, 64)
    path = tmp_path / "bench.json"
    result = run("decode", "--limit", "0", "--json", str(path))
    assert result.exit_code == 1  # nothing was measured
    assert len(json.loads(path.read_text())["skipped"]) == 2


def test_agreement_is_judged():
    x = jax.numpy.ones((1, 1, 2, 4))
    part = Partial(x, x[..., 0], x[..., 0])
    off = dataclasses.replace(part, acc=1.1 * x)
    assert paged.agreement(part, part, part, 0.05)["ok"]
    assert not paged.agreement(off, off, part, 0.05)["ok"]
    assert not paged.agreement(part, off, part, 0.05)["ok"]


def test_peers_of_a_gpu_are_missing_without_one():
    assert {peer.missing for peer in PEERS} == {"no NVIDIA GPU"}
    peers = tuple(dataclasses.replace(peer, packages=()) for peer in PEERS)
    labels = [job.label for job in decode.jobs(Setting(gpu=True, copy_gbps=1.0, matmul_tflops=1.0, peers=peers))]
    assert len(labels) == len(set(labels))
    for shape in DECODE.values():
        assert f"decode {shape.label}, cudnn_bf16" in labels


def test_kernel_times_are_medians_of_equal_runs(monkeypatch):
    timed = [("a", 1.0), ("b", 0.5), ("a", 1.0)] * timing.ITERATIONS
    monkeypatch.setattr(timing, "gpu_kernel_times", lambda run: timed)
    assert timing.kernel_times(lambda: None, calls=2) == {"a": 1000.0, "b": 250.0}
    monkeypatch.setattr(timing, "gpu_kernel_times", lambda run: timed[:-1])
    with pytest.raises(RuntimeError, match="expected the same kernels in each of 9 runs, got 26"):
        timing.kernel_times(lambda: None, calls=2)


def test_the_picture_has_a_panel_per_operation_with_rows_to_compare(tmp_path):
    rows = [row | {"bytes": 10**8} for row in rows_for(50.0)]
    path = tmp_path / "roofline.svg"
    roofline.draw(rows, path, copy_gbps=3000.0, title="a device")
    sizes = Counter((row["op"], roofline._shape(row)) for row in rows)
    assert path.read_text().count('<g id="axes_') == sum(size > 1 for size in sizes.values()) < len(sizes)
    alone = [row for row in rows if sizes[row["op"], roofline._shape(row)] == 1]
    roofline.draw(alone, path, copy_gbps=3000.0, title="a device")
    assert path.read_text().count('<g id="axes_') == len(alone)


@pytest.mark.parametrize("place", ["left", "right"])
def test_names_of_codes_are_beside_each_other_and_inside(place):
    rows = [{"op": "decode", "impl": "triton", "batch": 1, "seq": 9, "value": "mse2"} for _ in range(6)]
    for i, row in enumerate(rows):
        row |= {"key": f"mse{i + 2}", "us": 50.0 + i / 4, "bytes": 10**7 * (20 + i)}
    peer = {"op": "decode", "impl": "cudnn_bf16", "batch": 1, "seq": 9, "us": 99.0, "bytes": 10**9}
    figure = Figure(figsize=(3.6, 3.5))
    axes = figure.add_subplot()
    roofline._panel(axes, rows + [peer] * (place == "left"), 3000.0, {})
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(name) for name in axes.texts]  # without their lines
    assert len(boxes) == 6
    frame = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
