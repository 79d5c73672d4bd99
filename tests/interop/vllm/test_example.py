"""The script for users of vLLM runs as a user runs it: it starts a server, asks, and ends it."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

SCRIPT = Path(__file__).parents[3] / "examples" / "vllm_server.py"


@pytest.mark.slow
def test_server_answers_from_compressed_pages(two_layers):
    arguments = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32"]
    arguments += ["--kv-cache-memory-bytes", "4194304"]
    found = subprocess.run(
        [sys.executable, SCRIPT, two_layers, "w9 w8 w7", "--new-tokens", "8", *arguments],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-4000:]
    question, answer = found.stdout.strip().splitlines()
    assert question == "w9 w8 w7" and re.fullmatch(r"(w\d+ ?){8}", answer.strip())
    assert "tq_jax compresses 2 of 2 layers [0, 1] to K4/V4" in found.stderr


def test_a_server_that_does_not_start_is_said():
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    ended.wait()
    with pytest.raises(SystemExit, match="vLLM did not start and exited with status 3; its output says why"):
        runpy.run_path(str(SCRIPT))["wait"](ended, "http://127.0.0.1:9")
