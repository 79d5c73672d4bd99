"""A vLLM server whose KV cache is compressed, asked over HTTP.

    tq-jax calibrate MODEL
    python examples/vllm_server.py MODEL "Why is the sky blue?" --bits 4 --max-model-len 4096

MODEL is a folder or a name in the Hugging Face hub, of a model with a chat template. Without the file of key statistics
that `tq-jax calibrate` writes the server warns, and text is less close. Arguments that this script does not know go to
`vllm serve`, such as `--max-model-len`, or `--enforce-eager` on a CPU. The server ends with the script.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait(server: subprocess.Popen, address: str) -> None:
    """Waits until the server answers.

    Raises:
        SystemExit: If the server ends instead.
    """
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"vLLM did not start and exited with status {server.returncode}; its output says why")


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    """The reply of the server to a request."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def main() -> None:
    """Starts the server, asks each question, and ends the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, or its name in the Hugging Face hub")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--bits", type=int, default=4, help="bits per number of keys and values")
    parser.add_argument("--new-tokens", type=int, default=64, help="most tokens of an answer")
    options, for_vllm = parser.parse_known_args()

    port = free_port()
    backend = {"tq_jax": {"key_bits": options.bits, "value_bits": options.bits}}
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model),
            *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)),
            *("--attention-backend", "CUSTOM", "--additional-config", json.dumps(backend), *for_vllm),
        ],
        stdout=sys.stderr,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait(server, address)
        for question in options.questions:
            messages = [{"role": "user", "content": question}]
            reply = ask(
                address, "/v1/chat/completions", model="model", messages=messages, max_tokens=options.new_tokens,
                temperature=0,
            )  # fmt: skip
            print(f"\n{question}\n{reply['choices'][0]['message']['content']}")
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
