"""Time per decoded token against the tokens in the cache and against the cache's capacity, on this machine.

    python benchmarks/decode_curve.py --json benchmarks/results/decode_curve_cpu.json --plot decode_curve.png

SmolLM2-135M-Instruct decodes greedily after prompts of several lengths, from full-precision and K4/V4 caches. Time may
grow with what is attended to; it must not grow with capacity that is not used.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from matplotlib.figure import Figure

from tq_jax.data import persuasion
from tq_jax.evaluate.language import fill_cache, full_scheme, run_prompt, tq_scheme
from tq_jax.evaluate.report import JsonTarget, environment, open_console, progress_bar, write_json
from tq_jax.models import Sampling, load_model
from tq_jax.models.generate import decode_loop

USED = (256, 1024, 2048, 4096)
CAPACITIES = (4224, 8320)
STEPS, REPEATS = 17, 5


def main(
    json: JsonTarget = None,
    plot: Annotated[Path, typer.Option(help="Where to draw the curve.")] = Path("decode_curve.png"),
) -> None:
    """Measure and draw the curve."""
    console, model = open_console(json), load_model()
    tokens = jnp.asarray(model.tokenizer.encode(persuasion()[:40_000])[: max(USED)], jnp.int32)[None]
    rows = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(USED) * len(CAPACITIES) * 2)
        for used in USED:
            _, projections = run_prompt(model.decoder, tokens[:, :used])
            for capacity in CAPACITIES:
                full = full_scheme(model.decoder, capacity)
                packed = tq_scheme(model.decoder, capacity, key_bits=4, value_bits=4)
                for scheme in (full, packed):
                    progress.update(task, description=f"{scheme.label}, {used} of {capacity} tokens")
                    milliseconds = decode_time(model, scheme.cache, projections, used)
                    row = {"cache": scheme.label, "used": used, "capacity": capacity, "ms_per_token": milliseconds}
                    rows.append(row)
                    console.print(row)
                    progress.advance(task)
    draw(rows, plot)
    write_json(environment() | {"rows": rows}, json)


def decode_time(model, spec, projections, used: int) -> float:
    """Median milliseconds a token of the compiled decode loop."""
    times = []
    loop = None
    for _ in range(REPEATS):
        cache = fill_cache(model.decoder.init_cache(spec, batch=1), *projections, jnp.int32(used))
        arguments = (model.decoder, jnp.zeros(1, jnp.int32), cache, jax.random.split(jax.random.key(0), 1))
        stop = jnp.zeros(0, jnp.int32)
        options = {"sampling": Sampling(), "max_new_tokens": STEPS, "implementation": "auto"}
        loop = loop or decode_loop.lower(*arguments, stop, **options).compile()
        jax.block_until_ready(cache)
        started = time.perf_counter()
        jax.block_until_ready(loop(*arguments, stop))
        times.append((time.perf_counter() - started) / (STEPS - 1) * 1e3)
    return statistics.median(times)


def draw(rows: list[dict], path: Path) -> None:
    """One line a cache and capacity."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colors = {"bfloat16": "#777777", "K4/V4": "#1b6ca8"}
    for capacity, style in zip(CAPACITIES, ("-", "--"), strict=True):
        for cache, color in colors.items():
            chosen = [row for row in rows if row["cache"] == cache and row["capacity"] == capacity]
            points = [row["used"] for row in chosen], [row["ms_per_token"] for row in chosen]
            axes.plot(*points, style, marker="o", color=color, label=f"{cache}, room for {capacity}")
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds per decoded token", ylim=(0, None))
    axes.set_title("SmolLM2-135M, reference implementation on a CPU", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    typer.run(main)
