"""Generation on a GPU: tokens by kernels against tokens by the reference, and time a token against bfloat16 caches.

XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/generate.py --json generate.json [--only TEXT] [--model DIR]

Weights are random but for those of `--model`, a Hugging Face directory with a tokenizer, which reads prose.
"""

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tq_jax as tq
from tq_jax.commands.output import environment, write_json
from tq_jax.data import persuasion
from tq_jax.models import Decoder, DecoderConfig, generate, load_decoder, load_tokenizer, pad_prompts
from tq_jax.models.generate import prefill_step, time_decode
from tq_jax.models.sampling import Sampling

SHAPES = {
    "Llama shape": DecoderConfig(
        vocab_size=32000, dim=4096, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336,
        max_context=1 << 17,
    ),
    "SmolLM2 shape": DecoderConfig(
        vocab_size=49152, dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, ffn_dim=1536,
        tied_head=True, max_context=1 << 17,
    ),
}  # fmt: skip
NEW_TOKENS = 96
MODES = {
    "reference": {"implementation": "reference"},
    "kernels": {"implementation": "triton"},
    "precise kernels": {"implementation": "triton", "precise": True},
}


def random_decoder(config: DecoderConfig, dtype: Any) -> Decoder:
    """A decoder with random weights, made on the device."""

    @nnx.jit
    def make() -> Decoder:
        return Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))

    return make()


def cache_spec(config: DecoderConfig, max_tokens: int, bits: int | None) -> tq.CacheSpec:
    heads, dim = config.num_kv_heads, config.head_dim
    if bits is None:
        return tq.CacheSpec.full_precision(num_kv_heads=heads, head_dim=dim, max_tokens=max_tokens)
    quantizer = tq.QuantizerSpec(dim=dim, bits=bits, search=True)
    return tq.CacheSpec(heads, dim, max_tokens, quantizer, quantizer)


@functools.partial(jax.jit, static_argnames=("implementation", "precise"))
def forced_logits(
    decoder: Decoder, tokens: jax.Array, cache: tq.Cache, *, implementation: Any, precise: bool = False
) -> jax.Array:
    """Logits [n, b, vocab] after each of the tokens [b, n]."""

    def step(cache: tq.Cache, token: jax.Array) -> tuple[tq.Cache, jax.Array]:
        hidden, cache = decoder.extend(token[:, None], cache, implementation=implementation, precise=precise)
        return cache, decoder.logits(hidden)[:, 0]

    return jax.lax.scan(step, cache, tokens.T)[1]


def compare(decoder: Decoder, prompts: list[list[int]], bits: int, sampling: Sampling) -> dict[str, Any]:
    """Continuations by the reference and by the kernels, and the logits of all on the reference's tokens."""
    spec, key = cache_spec(decoder.config, 2048, bits), jax.random.key(7)
    tokens, lengths = pad_prompts(prompts)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(prompts)))
    options: dict[str, Any] = dict(cache_spec=spec, max_new_tokens=NEW_TOKENS, sampling=sampling, key=key)
    found, logits = {}, {}
    row: dict[str, Any] = {"prompts": [len(prompt) for prompt in prompts], "temperature": sampling.temperature}
    for mode, how in MODES.items():
        runs = [np.asarray(generate(decoder, tokens, lengths, **options, **how).tokens) for _ in range(2)]
        found[mode] = runs[0]
        row[f"{mode}, twice the same"] = bool((runs[0] == runs[1]).all())
        cache = decoder.init_cache(spec, batch=len(prompts))
        _, cache = prefill_step(decoder, tokens, lengths, cache, keys, sampling=sampling)
        given = jnp.asarray(found["reference"][:, :-1])
        logits[mode] = np.asarray(forced_logits(decoder, given, cache, **how), np.float64)
    exact = logits["reference"]
    scores = exact if not sampling.temperature else exact / sampling.temperature + _noise(keys, exact.shape)
    drawn = found["reference"][:, 1:].T
    row["reference draws its best score"] = bool((scores.argmax(-1) == drawn).all())
    top = np.sort(scores, axis=-1)[..., -2:]
    margin = top[..., 1] - top[..., 0]
    row["distinct tokens"] = [len(set(tokens.tolist())) for tokens in found["reference"]]
    row["median margin of a token"], row["least"] = float(np.median(margin)), float(margin.min())
    for mode in list(MODES)[1:]:
        row[mode] = _difference(found[mode] == found["reference"], logits[mode], exact, margin, sampling)
    return row


def _difference(
    same: np.ndarray, logits: np.ndarray, exact: np.ndarray, margin: np.ndarray, sampling: Sampling
) -> dict[str, Any]:
    """How tokens differ, [b, n], and logits [n - 1, b, vocab] on equal tokens.

    Where a row first differs, both have seen the same tokens: a tie to within the error of the logits there.
    """
    error = np.abs(logits - exact).max(-1) / (sampling.temperature or 1.0)
    ends = {i: int(np.argmin(tokens)) for i, tokens in enumerate(same) if not tokens.all()}
    firsts = [
        {"row": i, "token": n, "margin": float(margin[n - 1, i]), "logit error": float(error[n - 1, i])}
        for i, n in ends.items()
    ]
    return {
        "same tokens": bool(same.all()),
        "first differences": firsts,
        "all of them ties": all(first["margin"] <= 2 * first["logit error"] for first in firsts),
        "KL": float(np.mean(np.sum(np.exp(_log(exact)) * (_log(exact) - _log(logits)), -1))),
        "same top-1": float(np.mean(logits.argmax(-1) == exact.argmax(-1))),
        "median logit error": float(np.median(error)),
        "largest": float(error.max()),
    }


def _noise(keys: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """What drawing adds to the logits [n, b, vocab] after each token."""

    def draw(step: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), shape[2:]))(keys)

    return np.asarray(jax.lax.map(draw, jnp.arange(1, shape[0] + 1)))


def _log(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def compare_random(shape: str, dtype: str, bits: int) -> dict[str, Any]:
    config = SHAPES[shape]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (1200, 517)]
    return compare(random_decoder(config, jnp.dtype(dtype)), prompts, bits, Sampling())


def compare_trained(directory: str, dtype: str, bits: int, temperature: float) -> dict[str, Any]:
    """Trained weights after prose, tokens beyond the vocabulary left out."""
    decoder, tokenizer = load_decoder(directory, dtype=dtype), load_tokenizer(directory)
    ids = [i for i in tokenizer.encode(persuasion()[:20_000]) if i < decoder.config.vocab_size]
    return compare(decoder, [ids[:1200], ids[1500:2017]], bits, Sampling(temperature=temperature))


FILL = 1024
"""Tokens appended at a time to fill a cache."""


@functools.partial(jax.jit, donate_argnames=("cache",))
def fill(cache: tq.Cache, key: jax.Array) -> tq.Cache:
    """Appends random tokens."""
    shape = (cache.rows, FILL, cache.spec.num_kv_heads, cache.spec.head_dim)
    k, v = (jax.random.normal(part, shape, jnp.bfloat16) for part in jax.random.split(key))
    return tq.append(cache, k, v)


def timing(shape: str, batch: int, context: int) -> dict[str, Any]:
    """Time of a token in the compiled loop with bfloat16 weights, after random tokens in the cache."""
    config = SHAPES[shape]
    decoder = random_decoder(config, jnp.bfloat16)
    row: dict[str, Any] = {"batch": batch, "context": context}
    row["weights GB"] = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(decoder))) / 1e9
    for name, bits in (("bfloat16", None), ("K4/V4", 4), ("K3/V3", 3)):
        cache = decoder.init_cache(cache_spec(config, context + 256, bits), batch=batch)
        for seed in range(context // FILL):
            cache = fill(cache, jax.random.key(seed))
        first = jnp.zeros(batch, jnp.int32)
        copy = functools.partial(jax.tree.map, jnp.copy, cache)
        _, _, seconds = time_decode(decoder, first, copy, max_new_tokens=65, repeats=3)
        row[f"{name}, cache GB"], row[f"{name}, ms a token"] = cache.nbytes / 1e9, seconds / 64 * 1e3
        del cache, copy
    return row


def jobs(model: str | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every measurement by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for dtype in ("float32", "bfloat16"):
        for shape in SHAPES:
            found[f"same {dtype} {shape}, greedy"] = functools.partial(compare_random, shape, dtype, 4)
        for how, temperature in (("greedy", 0.0), ("drawn", 1.0)) if model is not None else ():
            assert model is not None
            job = functools.partial(compare_trained, model, dtype, 4, temperature)
            found[f"same {dtype} trained, {how}"] = job
    for shape, batch, context in (("Llama shape", 8, 8192), ("Llama shape", 1, 32768), ("SmolLM2 shape", 1, 8192)):
        found[f"time {shape} {batch}x{context}"] = functools.partial(timing, shape, batch, context)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", default=os.environ.get("OUT", ".") + "/generate.json")
    parser.add_argument("--only", default="", help="what the name of a job contains, several divided by |")
    parser.add_argument("--model", default=None)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, job in jobs(arguments.model).items():
        if not any(text in name for text in arguments.only.split("|")):
            continue
        started = time.perf_counter()
        try:
            row = job()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"[:400]}
        rows.append({"case": name} | row | {"seconds": round(time.perf_counter() - started, 1)})
        print(json.dumps(rows[-1]), flush=True)
        write_json(environment() | {"rows": rows}, arguments.json)
    sys.exit(not rows or any("error" in row for row in rows))


if __name__ == "__main__":
    main()
