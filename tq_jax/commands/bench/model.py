"""Decoding of a whole model: time per token, by tokens in the cache and by capacity of the cache.

SmolLM2-135M-Instruct decodes greedily after prompts of several lengths from full-precision and K4/V4 caches.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import tq_jax as tq
from tq_jax.commands.bench.job import Job, Row, Setting
from tq_jax.commands.divergence import Scheme, fill_cache, full_scheme, run_prompt, tq_scheme
from tq_jax.commands.inputs import open_model
from tq_jax.data import persuasion
from tq_jax.models import LanguageModel
from tq_jax.models.generate import time_decode

USED, CAPACITIES = (256, 1024, 2048, 4096), (4224, 8320)
NEW_TOKENS, REPEATS = 17, 5


@functools.cache
def _model() -> LanguageModel:
    return open_model(None)


def jobs(setting: Setting) -> Iterator[Job]:
    """Yields one measurement per prompt, capacity and kind of cache."""
    _model()  # a model that cannot be loaded is reported before anything is measured
    for used in USED:
        for capacity in CAPACITIES:
            for bits in (None, 4):
                name = f"K{bits}/V{bits}" if bits else "bfloat16"
                label = f"model {name}, {used} of {capacity} tokens"
                yield Job(label, functools.partial(run, used, capacity, bits, gpu=setting.gpu))


def run(used: int, capacity: int, bits: int | None, *, gpu: bool) -> Iterator[Row]:
    """Yields the row of one cache; "us" is the time per token."""
    decoder = _model().decoder
    scheme: Scheme = (
        tq_scheme(decoder, capacity, key_bits=bits, value_bits=bits) if bits else full_scheme(decoder, capacity)
    )
    projections = _projections(used)

    def make_cache() -> tq.Cache:
        return fill_cache(decoder.init_cache(scheme.cache, batch=1), *projections, jnp.int32(used))

    first = jnp.zeros(1, jnp.int32)
    _, _, seconds = time_decode(decoder, first, make_cache, max_new_tokens=NEW_TOKENS, repeats=REPEATS)
    stored = f"mse{bits}" if bits else "bf16"
    yield {
        "op": "model",
        "impl": "triton" if gpu else "reference",
        "batch": 1,
        "seq": used,
        "capacity": capacity,
        "key": stored,
        "value": stored,
        "us": round(seconds / (NEW_TOKENS - 1) * 1e6, 1),
    }


@functools.lru_cache(maxsize=1)
def _projections(used: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of a prompt from the shipped text."""
    model = _model()
    tokens = jnp.asarray(model.tokenizer.encode(persuasion()[:40_000])[:used], jnp.int32)[None]
    return run_prompt(model.decoder, tokens)[1]
