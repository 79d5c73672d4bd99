"""Runs an engine in a process of its own and reads its results while it measures."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interop.vllm.serve_bench.engine import STOPPED, Job

MODULE = "interop.vllm.serve_bench.engine"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps are timed in the process that runs them
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function asks each worker for its layers
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # a machine may have no network, and an engine uses one machine
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Settings of the engine's process, unless they are set already."""

PAUSE = 0.2
"""Seconds between two looks at an engine's results."""

GRACE = 20.0
"""Seconds after its deadline in which an engine may end by itself."""

LAST_LINES = 12
"""Lines of an engine's log that are an error message if it ends without one."""


def run_engine(job: Job, log: Path) -> Iterator[dict[str, Any]]:
    """Runs a job in a new process and yields its results as they come.

    Args:
        job: What to measure.
        log: File to which the engine's output is appended.

    Yields:
        {"about": ...} once the engine has started, {"row": ...} for every measurement, {"progress": text} during long
        ones, {"error": message} if the engine failed or was stopped because its deadline passed.
    """
    with tempfile.TemporaryDirectory(prefix="serve-bench-") as folder, log.open("a", encoding="utf-8") as output:
        source, target = Path(folder) / "job.json", Path(folder) / "lines.jsonl"
        source.write_text(json.dumps(dataclasses.asdict(job)))
        target.touch()
        place = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(source), str(target)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT | os.environ,
            start_new_session=True,  # workers of the engine end with it
        )
        failed = False
        try:
            with target.open(encoding="utf-8") as lines:
                for result in _results(process, lines, job.deadline + GRACE):
                    failed |= "error" in result
                    yield result
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode > 0 and not failed:
            said = log.read_text(encoding="utf-8", errors="replace")[place:].splitlines()
            yield {"error": f"exit code {process.returncode}: " + " | ".join(said[-LAST_LINES:])}


def _results(process: subprocess.Popen, lines: Any, end: float) -> Iterator[dict[str, Any]]:
    """Whole lines of a file that a process writes, until it ends or its time is up."""
    part = ""
    while True:
        ended = process.poll() is not None
        *whole, part = (part + lines.read()).split("\n")
        yield from map(json.loads, whole)
        if ended:
            if process.returncode < 0:
                yield {"error": f"stopped by {signal.Signals(-process.returncode).name}"}
            return
        if time.time() > end:
            yield {"error": STOPPED}
            return
        time.sleep(PAUSE)
