"""Questions of Reasoning Gym (arXiv 2505.24760, Apache-2.0): generators whose own verifiers grade the answers."""

import atexit
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tq_jax.commands.download import checked_wheel, keep_folder
from tq_jax.commands.tasks.item import Item
from tq_jax.models.fetch import cache_dir

PACKAGE = "reasoning-gym==0.1.25"
SHA256 = "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435"
DRIVER = Path(__file__).with_name("reasoning_driver.py")
REQUEST = "Write your final answer on the last line, in the form `Answer: ...`."
MARK = re.compile(r"(\*\*)?Answer:(\*\*)?")

TIMEOUT = 600.0
"""Most seconds to start, and to make questions."""

TIMEOUT_GRADE = 60.0
"""Most seconds of a verifier for one answer."""


def reasoning(dataset: str, *, count: int, seed: int = 42) -> list[Item]:
    """Questions of a data set of Reasoning Gym in its default configuration.

    A verifier that fails at an answer, or takes longer than a minute, counts as the grade 0. Some verifiers give an
    answer that is not right a small grade.

    Args:
        dataset: Name of the data set, such as "chain_sum".
        count: Number of questions.
        seed: Seed of the generator.

    Raises:
        ConnectionError: If the package and what it depends on could not be downloaded and installed.
        RuntimeError: If the process that makes questions and grades ends by itself; grading raises it, too.
        TimeoutError: If the questions take longer than ten minutes.
        ValueError: If there is no such data set, it makes no questions, or the package is not the expected one.
    """
    if count < 1:
        raise ValueError(f"reasoning: expected a positive count, got {count}")
    order = {"dataset": dataset, "count": count, "seed": seed}
    with _LOCK:
        reply = _make(order)
    if "names" in reply:
        some = ", ".join(reply["names"][:: max(1, len(reply["names"]) // 12)])
        raise ValueError(f"reasoning: expected one of {len(reply['names'])} data sets ({some} ...), got {dataset!r}")
    if "error" in reply:
        raise ValueError(f"reasoning: expected {count} questions of {dataset!r}, got {reply['error']}")
    return [_item(order, index, question) for index, question in enumerate(reply["questions"])]


def final_answer(answer: str) -> str:
    r"""The part of an answer that is graded: what follows the last `Answer:`, else the last line that is not empty.

    Example:
        >>> final_answer("4 + 3 is 7. Answer: 7"), final_answer("4 + 3 =\n7\n"), final_answer("**Answer: 7**")
        ('7', '7', '7')
    """
    marks = list(MARK.finditer(answer))
    if not marks:
        return (answer.strip().splitlines() or [""])[-1].strip()
    text = answer[marks[-1].end() :].strip()
    return text.removesuffix("**").strip() if marks[-1][1] and not marks[-1][2] else text


def _item(order: dict[str, Any], index: int, question: str) -> Item:
    """A question whose grade comes from the driver."""

    def grade(answer: str) -> float:
        with _LOCK:
            if _key(order) not in _start().made:  # the process is a new one
                _make(order)
            request = {"do": "grade", **order, "index": index, "answer": final_answer(answer)}
            try:
                reply = _start().ask(request, TIMEOUT_GRADE)
            except TimeoutError:
                return 0.0
        if "error" in reply:
            raise RuntimeError(f"reasoning: expected a grade of {order['dataset']!r}, got {reply['error']}")
        return reply["score"]

    return Item(f"{order['dataset']}-{index:04d}", f"{question.rstrip()}\n\n{REQUEST}", grade)


def _key(order: dict[str, Any]) -> tuple:
    return tuple(sorted(order.items()))


def _make(order: dict[str, Any]) -> dict[str, Any]:
    """The driver's reply to an order of questions."""
    driver = _start()
    reply = driver.ask({"do": "make", **order}, TIMEOUT)
    if "questions" in reply:
        driver.made.add(_key(order))
    return reply


def install() -> Path:
    """Folder of the package and what it depends on, which is installed once and is no part of this environment.

    Raises:
        ConnectionError: If pip could not download and install it.
        ValueError: If the package is not the expected one.
    """
    if sys.implementation.cache_tag is None:
        raise ValueError("reasoning: expected a Python with a cache tag, got one without")

    def fill(scratch: Path) -> Path:
        wheel = checked_wheel(PACKAGE, scratch, sha256=SHA256)
        print(f"installing {PACKAGE} and what it depends on (320 MB) ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary"]
        command += ["--target", str(scratch / "packages"), str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise ConnectionError(f"pip install {PACKAGE} failed: {reason}")
        return scratch / "packages"

    folder = cache_dir() / "tasks" / PACKAGE.replace("==", "-")
    return keep_folder(folder / sys.implementation.cache_tag, fill)


class _Driver:
    """The process that makes questions and grades.

    Attributes:
        made: Orders whose questions the process has.
    """

    def __init__(self, packages: Path):
        self.made: set[tuple] = set()
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(DRIVER), str(packages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONUTF8": "1", "PYTHONHASHSEED": "0", "MPLBACKEND": "Agg"},
        )
        self.ask(None, TIMEOUT)

    def ask(self, request: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        """The reply to a request, or the next line if there is none. After an exception, the process has ended.

        Args:
            request: The request.
            timeout: Most seconds.

        Raises:
            RuntimeError: If the process ended by itself.
            TimeoutError: If the reply did not come in time.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            if request is not None:
                print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # an interruption: the reply that is still to come must not answer another request
            self.close()
            raise
        finally:
            timer.cancel()
        if line and not late.is_set():
            return json.loads(line)
        self.errors.seek(0)
        reason = " | ".join(self.errors.read().strip().splitlines()[-3:])
        self.close()
        if late.is_set():
            raise TimeoutError(f"reasoning: expected a reply within {timeout:g} s, got none")
        raise RuntimeError(f"reasoning: expected a reply, got the end of the process: {reason}")

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        _start.cache_clear()
        atexit.unregister(self.close)
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):  # a request may be still in the buffer
                    stream.close()


_LOCK = threading.Lock()


@functools.cache
def _start() -> _Driver:
    """The process, started at the first request."""
    driver = _Driver(install())
    atexit.register(driver.close)
    return driver
