"""The throughput of many mixed prompts over few rows, against a batch that is always full."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tq_jax.commands.bench.job import Row
from tq_jax.commands.bench.model.filling import append_random
from tq_jax.commands.bench.model.plan import Task
from tq_jax.models import Decoder
from tq_jax.models.generate import time_decode
from tq_jax.models.many import ManyGenerations, generate_many

PROMPTS = 200
"""Prompts of a run."""

PROMPT_TOKENS, NEW_TOKENS = (32, 512), (32, 256)
"""Fewest and most tokens of a prompt, and of its continuation."""

STEPS = 32
"""Steps between two looks of the host at the tokens."""


def measure(decoder: Decoder, task: Task) -> Row:
    """Runs PROMPTS prompts of mixed lengths and continuations over `task.batch` rows.

    The time of the prompts, taken by a run in which every prompt draws one token only, is taken off. A batch that is
    always full draws the same number of tokens in steps of as many rows, each with the mean number of tokens.

    Args:
        decoder: The decoder.
        task: Rows and cache; `seq` is the capacity of a row.

    Returns:
        Fields of a row: tokens per second, those of the full batch, and the ratio of the two.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(*PROMPT_TOKENS, PROMPTS, endpoint=True)
    limits = rng.integers(*NEW_TOKENS, PROMPTS, endpoint=True)
    prompts = [rng.integers(0, decoder.config.vocab_size, n).tolist() for n in lengths]
    spec = task.kind.spec(decoder.config, task.seq)

    def run(limits: list[int]) -> tuple[float, ManyGenerations]:
        # One prompt per prefill, so that few lengths are all that is compiled.
        many = generate_many(
            decoder, prompts, rows=task.batch, cache_spec=spec, max_new_tokens=limits, steps=STEPS, chunk=1
        )
        begun = time.perf_counter()
        many.collect()
        return time.perf_counter() - begun, many

    begun = time.perf_counter()
    run([2] * PROMPTS)
    compiled = time.perf_counter() - begun
    prompt_s, (whole_s, many) = run([1] * PROMPTS)[0], run(limits.tolist())
    drawn = int(np.sum(limits)) - PROMPTS  # the first token of each is the prompt's
    full_s = drawn / task.batch * _full_step(decoder, task, int(np.mean(lengths) + np.mean(limits) / 2))
    found: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": drawn, "s": whole_s, "prompt_s": prompt_s}
    found |= {"full_s": full_s, "over_full": full_s / (whole_s - prompt_s), "used_rows": many.tally.use}
    row = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}
    return row | {"tokens_per_s": round(drawn / (whole_s - prompt_s), 1), "compile_s": round(compiled, 1)}


def _full_step(decoder: Decoder, task: Task, tokens: int) -> float:
    """Seconds per step of a batch of which every row has work and so many tokens."""
    spec, steps = task.kind.spec(decoder.config, task.seq), 2 * STEPS

    def filled() -> Any:
        cache = decoder.init_cache(spec, batch=task.batch)
        return append_random(cache, jax.random.key(0), jnp.int32(tokens - STEPS), chunk=tokens)

    first = jnp.zeros(task.batch, jnp.int32)
    return time_decode(decoder, first, filled, max_new_tokens=steps + 1, repeats=3)[2] / steps
