"""A question with the rule that grades its answer."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        name: Name of the question.
        prompt: What the user says.
        grade: Gives an answer between 0 and 1.
        begins: First words of the answer, which the model goes on with.
    """

    name: str
    prompt: str
    grade: Callable[[str], float]
    begins: str = ""
