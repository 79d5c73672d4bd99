"""Time of generation on a GPU: a token from compressed caches against one from a bfloat16 cache, random weights.

python benchmarks/generate.py --json generate.json
"""

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from flax import nnx

import tq_jax as tq
from benchmarks import jobs
from tests.gpu.decoders import SHAPES, cache_spec, random_decoder
from tq_jax.models.generate import time_decode

FILL = 1024
"""Tokens that are appended at once to fill a cache."""


@functools.partial(jax.jit, donate_argnames=("cache",))
def fill(cache: tq.Cache, key: jax.Array) -> tq.Cache:
    """Appends random tokens."""
    shape = (cache.rows, FILL, cache.spec.num_kv_heads, cache.spec.head_dim)
    k, v = (jax.random.normal(part, shape, jnp.bfloat16) for part in jax.random.split(key))
    return tq.append(cache, k, v)


def time_tokens(shape: str, batch: int, context: int) -> dict[str, Any]:
    """Time per token in the compiled loop with bfloat16 weights, behind random tokens in the cache."""
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
        row[f"{name}, cache GB"], row[f"{name}, ms per token"] = cache.nbytes / 1e9, seconds / 64 * 1e3
        del cache, copy
    return row


CASES = (("Llama shape", 8, 8192), ("Llama shape", 1, 32768), ("SmolLM2 shape", 1, 8192))
"""Shape of the model, sequences, and tokens in the cache of each."""


def main() -> None:
    options = jobs.make_parser(__doc__).parse_args()
    jobs.prepare()
    timings = {
        f"time {shape} {batch}x{context}": functools.partial(time_tokens, shape, batch, context)
        for shape, batch, context in CASES
    }
    sys.exit(not jobs.run(timings, options))


if __name__ == "__main__":
    main()
