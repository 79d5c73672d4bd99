"""Answers of every cache to every question of a task, graded, and divergence by step."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tq_jax.commands.divergence import full_scheme
from tq_jax.commands.eval.schemes import Candidate, Packed, candidates, choose
from tq_jax.commands.rivals.calibrated import EVERY
from tq_jax.commands.rivals.roundings import Rival
from tq_jax.commands.tasks.questions import Batch, Task
from tq_jax.commands.tasks.score import interval
from tq_jax.commands.tasks.steps import Steps, step_divergence, steps_of, write_answers
from tq_jax.models import Decoder, LanguageModel

Row = dict[str, Any]
EXACT = "float32"
"""Label of the cache whose answers are the reference."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The caches that answer.

    Attributes:
        bits: Pairs of key and value bits of this package's caches.
        windows: Numbers of latest tokens in full precision.
        own: Rivals beside the built-in ones.
        only: Parts of labels of the caches that answer; all if there are none.
    """

    bits: tuple[tuple[float, float], ...]
    windows: tuple[int, ...]
    own: tuple[Rival, ...] = ()
    only: tuple[str, ...] = ()

    def caches(self, decoder: Decoder, max_tokens: int) -> list[tuple[int | None, Candidate]]:
        """The caches that answer, with their windows: the reference, and those that are wanted.

        Caches in full precision have no window.

        Args:
            decoder: The model.
            max_tokens: Capacity of a cache row, tokens.

        Raises:
            typer.BadParameter: If no label has one of the parts.
        """
        every: list[tuple[int | None, Candidate]] = [(None, Packed(full_scheme(decoder, max_tokens)))]
        for window in self.windows:
            _, *coded = candidates(decoder, max_tokens, bits=self.bits, window=window, rivals=EVERY + self.own)
            every += [(window, candidate) for candidate in coded]
        exact = Packed(full_scheme(decoder, max_tokens, dtype=EXACT))
        return [(None, exact), *choose(every, decoder, self.only)]


def measure_task(
    model: LanguageModel,
    task: Task,
    batches: Sequence[Batch],
    plan: Plan,
    known: Sequence[Row],
    *,
    advance: Callable[[str], None] = lambda label: None,
) -> Iterator[Row]:
    """Yields the rows of a task, full precision first, except rows that are known.

    Args:
        model: The model.
        task: The questions.
        batches: The same in batches.
        plan: The caches.
        known: Rows that are not measured again.
        advance: Called after each batch of each cache with the cache's label.
    """
    decoder, max_tokens = model.decoder, batches[0].tokens.shape[1] + task.most
    caches = plan.caches(decoder, max_tokens)
    exact = steps_of(caches[0][1])
    done = {(row["window"], row["label"]) for row in known if row["task"] == task.name}
    if all((window, candidate.describe(decoder)["label"]) in done for window, candidate in caches):
        return
    right = [_answers(model, batch, exact, task.most) for batch in batches]
    for window, candidate in caches:
        row = {"task": task.name, "window": window} | candidate.describe(decoder)
        if (window, row["label"]) in done:
            continue
        steps, answers, divergences = steps_of(candidate), [], []
        for batch, expected in zip(batches, right, strict=True):
            if steps == exact:
                answers.append(expected)
            else:
                answers.append(_answers(model, batch, steps, task.most))
                divergences.append(_divergence(decoder, batch, expected, steps, exact))
            advance(row["label"])
        yield row | grade(model, batches, answers) | by_step(divergences)


def _answers(model: LanguageModel, batch: Batch, steps: Steps, most: int) -> np.ndarray:
    """Tokens of the answers, int32 [b, most], -1 after each."""
    decoder = model.decoder
    stop = jnp.asarray(model.config.stop_tokens, jnp.int32)
    prompts = batch.tokens, batch.lengths
    found, _ = write_answers(decoder, *prompts, stop, steps.empty(decoder, *prompts), steps=steps, most=most)
    return np.asarray(found)


def _divergence(decoder: Decoder, batch: Batch, answers: np.ndarray, steps: Steps, exact: Steps) -> np.ndarray:
    """Divergences of the batch's own questions, float32 [questions, most]."""
    prompts = batch.tokens, batch.lengths
    caches = (way.empty(decoder, *prompts) for way in (steps, exact))
    found, _ = step_divergence(decoder, *prompts, jnp.asarray(answers), *caches, steps=steps, exact=exact)
    return np.asarray(found)[: len(batch.items)]


def grade(model: LanguageModel, batches: Sequence[Batch], answers: Sequence[np.ndarray]) -> Row:
    """Scores and lengths of answers, as fields of a row.

    Args:
        model: The model.
        batches: The questions.
        answers: Tokens of the answers to each batch, -1 after each.
    """
    scores, counts, open_ends = {}, [], 0
    stop = set(model.config.stop_tokens)
    for batch, found in zip(batches, answers, strict=True):
        for item, row in zip(batch.items, found, strict=False):  # rows that no question has are behind
            tokens = row[row >= 0].tolist()
            scores[item.name] = item.grade(model.tokenizer.decode(tokens))
            counts.append(len(tokens))
            open_ends += tokens[-1] not in stop
    mean = float(np.mean(list(scores.values())))
    low, high = interval(mean, len(scores))
    fields = {"items": len(scores), "score": mean, "low": low, "high": high}
    return fields | {"tokens": float(np.mean(counts)), "unfinished": open_ends / len(scores), "scores": scores}


def by_step(divergences: Sequence[np.ndarray]) -> Row:
    """Mean divergence in stretches of steps that double in length, as fields of a row.

    The first token is left out: the prompt attends exactly.

    Example:
        >>> by_step([np.array([[0.0, 1.0, 2.0, 4.0, np.nan]])])["kl_by_step"]
        [{'first': 1, 'last': 1, 'kl': 1.0}, {'first': 2, 'last': 3, 'kl': 3.0}]
    """
    if not divergences:
        return {"kl_mean": 0.0, "kl_by_step": []}
    found, stretches, first = np.concatenate(divergences).astype(np.float64), [], 1
    while first < found.shape[1] and np.isfinite(found[:, first]).any():
        part = found[:, first : 2 * first]
        last = min(2 * first, found.shape[1]) - 1
        stretches.append({"first": first, "last": last, "kl": float(np.nanmean(part))})
        first *= 2
    later = found[:, 1:]
    return {"kl_mean": float(np.nanmean(later)) if np.isfinite(later).any() else 0.0, "kl_by_step": stretches}
