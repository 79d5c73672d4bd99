"""Runs a script of RULER in a process of its own, with stand-ins for packages that it imports but hardly uses.

The process reads an order as JSON from its standard input and writes `made.json` into the folder of the order.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

STUCK = 3
"""Exit status when no further question comes."""


class _Progress:
    """Ends the process when a question takes too long: the scripts retry a question that does not fit for ever.

    Attributes:
        patience: Seconds of processor time for a question.
        made: Number of questions of the loop under way.
    """

    def __init__(self, patience: float):
        self.patience, self.made = patience, 0
        signal.signal(signal.SIGPROF, self._stop)

    def loop(self, items: Iterable[Any], *_: Any, **__: Any) -> Iterator[Any]:
        """Stands in for `tqdm.tqdm`."""
        for self.made, item in enumerate(items):
            signal.setitimer(signal.ITIMER_PROF, self.patience)
            yield item
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _stop(self, *_: Any) -> None:
        """Ends the process; an exception would be caught by the scripts, and so would be `sys.exit`."""
        message = f"{self.made} questions made, and then none within {self.patience:g} s of processor time"
        print(message, file=sys.stderr, flush=True)
        os._exit(STUCK)


class _Counter:
    """Stands in for RULER's tokenizers; like their own `tokenize`, it adds no special tokens."""

    def __init__(self, path: Path):
        import tokenizers

        self.backend = tokenizers.Tokenizer.from_file(str(path))
        self.backend.no_truncation()
        self.backend.no_padding()

    def text_to_tokens(self, text: str) -> list[str]:
        """Tokens of a text."""
        return self.backend.encode(text, add_special_tokens=False).tokens


def _no_sentences(text: str) -> list[str]:
    raise NotImplementedError("expected a subset without essays, got one that splits a text into sentences")


def _supply(name: str, **members: Any) -> None:
    """Makes a module that has these members only."""
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def _describe(root: Path, subset: str) -> dict[str, Any]:
    """Name and arguments of the script, template, and first words of answers, as in `data/prepare.py`."""
    import yaml

    templates = importlib.import_module("long_context_eval.data.template").Templates
    tasks = importlib.import_module("long_context_eval.data.synthetic.constants").TASKS
    config = yaml.safe_load((root / "synthetic.yaml").read_text("utf-8"))[subset]
    config |= tasks[config["task"]]
    return config | {"template": templates["base"].format(task_template=config["template"]) + config["answer_prefix"]}


def _split(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A question in parts. The text ends with the prefix, and examples before the question may have it, too."""
    at = row["input"].rindex(prefix.partition("{")[0])
    return {"prompt": row["input"][:at], "begins": row["input"][at:], "answers": row["outputs"]}


def main() -> None:
    """Carries out the order."""
    order = json.load(sys.stdin)
    sys.path[:0] = order["packages"]
    root, folder = Path(order["packages"][0], "long_context_eval"), Path(order["folder"])
    counter = _Counter(folder / "tokenizer.json")
    for name in ("tokenizer", "long_context_eval.data.tokenizer"):
        _supply(name, select_tokenizer=lambda kind, path: counter)
    _supply("tqdm", tqdm=_Progress(order["patience"]).loop)
    _supply("nltk")
    _supply("nltk.tokenize", sent_tokenize=_no_sentences)
    config = _describe(root, order["subset"])
    script = root / "data" / "synthetic" / f"{config['task']}.py"
    arguments = {
        "save_dir": folder,
        "save_name": order["subset"],
        "subset": "validation",
        "tokenizer_path": folder / "tokenizer.json",
        "tokenizer_type": "hf",
        "max_seq_length": order["length"],
        "tokens_to_generate": config["tokens_to_generate"],
        "num_samples": order["count"],
        "random_seed": order["seed"],
        **config["args"],
        "template": config["template"],
    }
    sys.argv = [str(script), *(f"--{name}={value}" for name, value in arguments.items())]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    lines = (folder / order["subset"] / "validation.jsonl").read_text("utf-8").splitlines()
    made = [_split(json.loads(line), config["answer_prefix"]) for line in lines]
    (folder / "made.json").write_text(json.dumps(made), "utf-8")


if __name__ == "__main__":
    main()
