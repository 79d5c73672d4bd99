"""What running a prompt in chunks costs in quality: tokens see those of earlier chunks as the cache holds them.

python benchmarks/prompt_chunks.py --json prompt_chunks.json
"""

import functools
import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import typer

import tq_jax as tq
from tq_jax.commands.inputs import open_model
from tq_jax.commands.options import DEFAULT_MODEL, JsonTarget, parse_numbers
from tq_jax.commands.output import environment, open_console, progress_bar, write_json
from tq_jax.data import persuasion
from tq_jax.models import Decoder
from tq_jax.models.layer_caches import Caches

BITS = (4, 3, 2)
"""Bits of keys and values."""


@functools.partial(jax.jit, donate_argnames="cache")
def run_chunk(decoder: Decoder, tokens: jax.Array, cache: Caches) -> tuple[jax.Array, Caches]:
    """Log-probabilities of the token after each token of a chunk, [t, vocab], and the cache."""
    hidden, cache = decoder.extend(tokens, cache)
    return jax.nn.log_softmax(decoder.logits(hidden)[0]), cache


@jax.jit
def run_whole(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """The same of a prompt that runs at once."""
    return jax.nn.log_softmax(decoder.logits(decoder.forward(tokens))[0])


@jax.jit
def divergence(exact: jax.Array, found: jax.Array) -> jax.Array:
    """KL(exact || found) of each position, nats."""
    return jnp.sum(jnp.exp(exact) * (exact - found), axis=1)


def measure(decoder: Decoder, tokens: jax.Array, exact: jax.Array, *, chunk: int, bits: int) -> dict[str, Any]:
    """Divergence of the positions behind the first chunk."""
    config, length = decoder.config, tokens.shape[1]
    spec = tq.CacheSpec.recommended(config.num_kv_heads, config.head_dim, length, bits, bits)
    cache, parts = decoder.init_cache(spec, batch=1), []
    for start in range(0, length, chunk):
        found, cache = run_chunk(decoder, tokens[:, start : start + chunk], cache)
        parts.append(divergence(exact[start : start + chunk], found))
    behind = jnp.concatenate(parts)[chunk:]
    return {
        "key": f"mse{bits}",
        "value": f"mse{bits}",
        "tokens": length,
        "chunk": chunk,
        "positions": behind.size,
        "kl_mean": float(f"{float(behind.mean()):.4g}"),
        "kl_last": float(f"{float(behind[-1]):.4g}"),
    }


def main(
    model: Annotated[str | None, typer.Option("--model", help="Name or path of the model.")] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of the prompt.", min=2)] = 4096,
    chunks: Annotated[str, typer.Option("--chunks", help="Tokens per chunk, comma-separated.")] = "512,1024,2048",
    json: JsonTarget = None,
) -> None:
    """Compare prompts in chunks with prompts that run at once, on a model and a novel."""
    loaded, console = open_model(model), open_console(json)
    tokens = jnp.asarray(loaded.tokenizer.encode(persuasion())[:length], jnp.int32)[None]
    exact = run_whole(loaded.decoder, tokens)
    jobs = [(chunk, bits) for chunk in parse_numbers(chunks, int) for bits in BITS]
    rows: list[dict[str, Any]] = []
    with progress_bar(console) as bar:
        task = bar.add_task("chunks", total=len(jobs))
        for chunk, bits in jobs:
            rows.append(measure(loaded.decoder, tokens, exact, chunk=chunk, bits=bits))
            console.print(rows[-1])
            bar.advance(task)
    write_json(environment() | {"model": model or DEFAULT_MODEL, "text": "persuasion", "rows": rows}, json)


if __name__ == "__main__":
    typer.run(main)
