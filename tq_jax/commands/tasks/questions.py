"""Tasks by their names, and the prompts of their questions for a model."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Array, Int

from tq_jax.commands.options import refusing
from tq_jax.commands.tasks.gsm8k import gsm8k
from tq_jax.commands.tasks.item import Item
from tq_jax.commands.tasks.reasoning import reasoning
from tq_jax.commands.tasks.ruler import RULER, ruler
from tq_jax.models import LanguageModel, Tokenizer

NAMES = f"gsm8k, ruler/SUBSET ({', '.join(RULER)}), reasoning/DATASET"
"""How tasks are named."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        name: Name of the task.
        items: The questions.
        most: Most tokens of an answer.
    """

    name: str
    items: list[Item]
    most: int


def load_tasks(names: Sequence[str], tokenizer: Tokenizer, *, count: int, most: int, length: int) -> list[Task]:
    """Tasks by their names.

    Args:
        names: See NAMES.
        tokenizer: The model's tokenizer, by which RULER counts tokens.
        count: Questions per task.
        most: Most tokens of an answer; RULER's own number if that is less.
        length: Tokens of RULER's questions, their answers included.

    Raises:
        typer.BadParameter: If there is no such task, or its questions cannot be had.
    """
    with refusing("models"):
        return [_load(name, tokenizer, count, most, length) for name in names]


def _load(name: str, tokenizer: Tokenizer, count: int, most: int, length: int) -> Task:
    kind, _, part = name.partition("/")
    if kind == "ruler" and part:
        items = ruler(part, tokenizer=tokenizer, length=length, count=count)
        return Task(name, items, min(most, RULER[part]))
    if kind == "reasoning" and part:
        return Task(name, reasoning(part, count=count), most)
    if name == "gsm8k":
        return Task(name, gsm8k(count=count), most)
    raise ValueError(f"expected a task among {NAMES}, got {name!r}")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Questions that are answered together.

    Attributes:
        items: The questions.
        tokens: Right-padded prompts, int32 [b, t]; the last prompt fills rows that no question has.
        lengths: Tokens of each prompt, int32 [b].
    """

    items: list[Item]
    tokens: Int[Array, "b t"]
    lengths: Int[Array, "b"]


def make_batches(model: LanguageModel, task: Task, *, batch: int) -> list[Batch]:
    """The questions of a task in batches of one shape, so that one compiled function answers all.

    Args:
        model: The model, whose chat template makes the prompts; a model without one gets the bare words.
        task: The questions.
        batch: Questions that are answered together.

    Raises:
        typer.BadParameter: If a prompt with its answer exceeds the model's context.
    """
    prompts = [encode(model.tokenizer, item) for item in task.items]
    width, batch = max(map(len, prompts)), min(batch, len(prompts))
    limit = model.config.max_context
    if width + task.most > limit:
        raise typer.BadParameter(
            f"{task.name}: expected at most {limit} tokens of a prompt with its answer, the model's context, "
            f"got {width} and {task.most}"
        )
    pairs = list(zip(task.items, prompts, strict=True))
    return [_stack(pairs[i : i + batch], batch, width) for i in range(0, len(pairs), batch)]


def encode(tokenizer: Tokenizer, item: Item) -> list[int]:
    """Tokens of a question and the first words of its answer."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(f"{item.prompt}{item.begins}")
    chat = tokenizer.chat_prompt([{"role": "user", "content": item.prompt}])
    return tokenizer.encode(chat + item.begins, add_special_tokens=False)


def _stack(pairs: Sequence[tuple[Item, list[int]]], batch: int, width: int) -> Batch:
    tokens, lengths = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
    filled = [prompt for _, prompt in pairs] + [pairs[-1][1]] * (batch - len(pairs))
    for row, prompt in enumerate(filled):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return Batch([item for item, _ in pairs], jnp.asarray(tokens), jnp.asarray(lengths))
