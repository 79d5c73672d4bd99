"""The throughput of many mixed prompts over few rows, against a batch that is always full."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tq_jax.commands.bench.job import Row
from tq_jax.commands.bench.model.filling import append_random
from tq_jax.commands.bench.model.plan import Task
from tq_jax.models import Decoder, Sampling
from tq_jax.models.many import ManyGenerations, generate_many
from tq_jax.models.many.steps import FlatDecoder, Rows, advance_rows

PROMPTS = 200
"""Prompts of a run."""

PROMPT_TOKENS, NEW_TOKENS = (32, 512), (32, 256)
"""Fewest and most tokens of a prompt, and of its continuation."""

STEPS = 8
"""Steps between two looks of the host at the tokens, those of `generate_many` by default."""

FULL_CALLS, REPEATS = 8, 3
"""Calls of the loop by which a step of a full batch is timed, and how often."""


def measure(decoder: Decoder, task: Task) -> Row:
    """Runs PROMPTS prompts of mixed lengths and continuations over `task.batch` rows.

    The same work over rows that are always in use would take the time of the prompts, measured by a run in which every
    prompt draws one token only, and as many steps as the other tokens fill. Such a step is timed by the same compiled
    loop with all rows at work, each with as many tokens as rows of the run have on average over their steps.

    Args:
        decoder: The decoder.
        task: Rows and cache; `seq` is the capacity of a row.

    Returns:
        Fields of a row: seconds and new tokens per second, prompts included; seconds of the prompts and of the steps of
        a full batch, and `over_full`, the sum of these two over the seconds of the run.
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
    steps = limits - 1  # the first token of each is the prompt's
    mean_tokens = int(np.sum(steps * (lengths + steps / 2)) / np.sum(steps))
    full_s = int(np.sum(steps)) / task.batch * _full_step(decoder, task, mean_tokens)
    drawn = int(np.sum(limits))
    found: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": drawn, "s": whole_s, "prompt_s": prompt_s}
    found |= {"full_s": full_s, "over_full": (prompt_s + full_s) / whole_s, "used_rows": many.tally.use}
    row = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}
    return row | {"tokens_per_s": round(drawn / whole_s, 1), "compile_s": round(compiled, 1)}


def _full_step(decoder: Decoder, task: Task, tokens: int) -> float:
    """Seconds per step of rows that are all at work and have so many tokens, by calls that none waits for."""
    spec, steps = task.kind.spec(decoder.config, task.seq), STEPS * FULL_CALLS
    flat, stop, idle = FlatDecoder.of(decoder), jnp.full(8, -1, jnp.int32), np.zeros(task.batch, bool)
    options: dict[str, Any] = {"sampling": Sampling(), "steps": STEPS, "implementation": "auto", "precise": False}
    before, times = max(tokens - steps // 2, 1), []
    for _ in range(1 + REPEATS):  # the first warms up
        empty = decoder.init_cache(spec, batch=task.batch)
        arrays = jax.random.key(0), jnp.int32(0), jnp.int32(before)
        [cache] = append_random(decoder, empty, *arrays, chunk=before)
        one = jnp.ones(task.batch, jnp.int32)
        rows = Rows(prompt=one, token=one, count=one, limit=one * (steps + 2), done=one == 0)
        jax.block_until_ready((cache, rows))
        begun = time.perf_counter()
        for _ in range(FULL_CALLS):
            _, rows, cache = advance_rows(flat, rows, cache, idle, jax.random.key(0), stop, **options)
        jax.block_until_ready(rows)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:]) / steps
