"""The OpenAI server in its own processes, on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("vllm")

from vllm_engines import NEW, own_answers

import tq_jax as tq

pytestmark = pytest.mark.slow

PATIENCE = 300
"""Seconds that a server may take to start on a busy machine."""


@pytest.fixture(scope="module")
def server(two_layers, tmp_path_factory):
    """Address of a server of 2-bit pages, so coarse that tokens depend on them, and the file of what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = {"tq_jax": {"key_bits": 2, "value_bits": 2, "search": False, "window": 0, "sinks": 0}}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", two_layers),
        *("--attention-backend", "CUSTOM", "--additional-config", json.dumps(options)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--block-size", "32", "--kv-cache-memory-bytes", str(1 << 22)),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield address, log
    finally:
        process.terminate()
        process.wait(60)


def _answers(address):
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def ask(address, path, **body):
    request = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body | {"ignore_eos": True}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        return json.load(reply)


def test_completions_are_those_of_our_cache(server, two_layers, prompts):
    address, log = server
    two = tq.QuantizerSpec(32, 2)
    expected = own_answers(two_layers, prompts[:2], key=two, value=two)
    found = ask(address, "completions", prompt=prompts[:2], max_tokens=NEW, temperature=0, return_token_ids=True)
    assert [choice["token_ids"] for choice in found["choices"]] == expected
    assert expected[0] != own_answers(two_layers, prompts[:1])[0]  # of 4 bits
    said = log.read_text()
    assert "tq_jax compresses 2 of 2 layers [0, 1] to K2/V2 (20 instead of 256 bytes per head and token)" in said
    assert "The same memory holds 12.80 times as many tokens" in said


def test_chat(server):
    address, _ = server
    messages = [{"role": "user", "content": "w9 w8 w7"}]
    replies = [ask(address, "chat/completions", messages=messages, max_tokens=8, temperature=0) for _ in range(2)]
    texts = [reply["choices"][0]["message"]["content"] for reply in replies]
    assert texts[0] == texts[1] and len(texts[0].split()) == 8
    assert replies[0]["usage"]["prompt_tokens"] == len(["w3", "w9", "w8", "w7", "w4"])
