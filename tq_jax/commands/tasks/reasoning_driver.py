"""Makes questions of Reasoning Gym and grades answers, in a process of its own.

The process gets the folder of the package as its argument. It reads requests from its standard input and answers them
on its standard output, one line of JSON each; the first line says that it is ready.
"""

import json
import os
import sys
from typing import Any


class _Sets:
    """Data sets that were asked for, and their questions."""

    def __init__(self) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        self.names, self.create = sorted(DATASETS), reasoning_gym.create_dataset
        self.kept: dict[tuple, tuple[Any, list[dict[str, Any]]]] = {}

    def make(self, dataset: str, count: int, seed: int) -> dict[str, Any]:
        """Questions of a data set."""
        if dataset not in self.names:
            return {"names": self.names}
        made = self.create(dataset, seed=seed, size=count)
        entries = [made[i] for i in range(count)]
        self.kept[dataset, count, seed] = made, entries
        return {"questions": [entry["question"] for entry in entries]}

    def grade(self, dataset: str, count: int, seed: int, index: int, answer: str) -> dict[str, Any]:
        """The verifier's score of an answer; 0 if the verifier fails at it."""
        made, entries = self.kept[dataset, count, seed]
        try:
            return {"score": float(made.score_answer(answer=answer, entry=entries[index]))}
        except Exception as error:  # verifiers parse whatever a model writes
            return {"score": 0.0, "failure": repr(error)}


def main() -> None:
    """Answers requests until the standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # data sets that print do not disturb the replies
    sys.path.insert(0, sys.argv[1])
    sets = _Sets()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(sets, request.pop("do"))(**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
