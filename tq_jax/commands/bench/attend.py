"""Attention over a whole cache: window and sink tokens in full precision, all other tokens in packed pages."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tq_jax.attention import Implementation, attend
from tq_jax.cache import Cache, init_cache
from tq_jax.cache_spec import CacheSpec
from tq_jax.commands.bench.job import Job, Row, Setting
from tq_jax.commands.bench.paged import random_array
from tq_jax.commands.bench.shapes import DECODE, SMALL, Shape
from tq_jax.commands.bench.timing import num_copies, time_jax
from tq_jax.quantizer import QuantizerSpec

WINDOW, SINKS = 128, 4
TOLERANCE = 4e-3
"""Largest relative error of outputs that are rounded to bfloat16."""


def jobs(setting: Setting) -> Iterator[Job]:
    """Yields the measurements of `attend` at 4 bits."""
    shapes = [DECODE[name] for name in ("batch 8", "batch 32", "long", "single")] if setting.gpu else [SMALL["decode"]]
    for shape in shapes:
        yield Job(f"attend {shape.label}, mse4/mse4", functools.partial(run_case, shape, setting))


def run_case(shape: Shape, setting: Setting, *, bits: int = 4, page_size: int = 256) -> Iterator[Row]:
    """Yields the row of the project's kernels, or of the reference if there is no GPU."""
    quantizer = QuantizerSpec(shape.head_dim, bits)
    tokens = shape.seq + WINDOW + SINKS
    spec = CacheSpec(
        shape.kv_heads,
        shape.head_dim,
        tokens,
        key=quantizer,
        value=quantizer,
        window=WINDOW,
        sink_tokens=SINKS,
        page_size=page_size,
    )
    exact = (WINDOW + SINKS) * 4 * shape.head_dim * shape.kv_heads
    nbytes = shape.batch * (shape.seq * spec.bytes_per_token() + exact)
    copies = num_copies(nbytes) if setting.gpu else 1
    cache = random_cache(spec, copies * shape.batch, tokens)
    query = jax.random.normal(jax.random.key(1), (shape.batch, 1, shape.q_heads, shape.head_dim), jnp.bfloat16)
    rows = jnp.arange(copies * shape.batch, dtype=jnp.int32).reshape(copies, shape.batch)
    implementation = "triton" if setting.gpu else "reference"

    def compiled(implementation: Implementation) -> Any:
        run = jax.jit(lambda query, cache, rows: attend(query, cache, rows=rows, implementation=implementation))
        return run.lower(query, cache, rows[0]).compile()

    kernel, inputs = compiled(implementation), [(query, cache, row) for row in rows]
    row = {"op": "attend", "impl": implementation, **shape.as_dict(), "page_size": page_size, "paged": True}
    row |= {"key": f"mse{bits}", "value": f"mse{bits}", "window": WINDOW}
    if setting.gpu:
        got, again, want = (f(*inputs[0]).astype(jnp.float32) for f in (kernel, kernel, compiled("reference")))
        error, same = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)), bool(jnp.array_equal(got, again))
        row |= {"error": error, "same_twice": same, "ok": same and error <= TOLERANCE}
    timing = time_jax(kernel, inputs)
    yield row | timing.as_dict() | setting.floor(timing.us, nbytes, shape.operations)


def random_cache(spec: CacheSpec, rows: int, length: int) -> Cache:
    """A cache of random bytes and positive scales, as if filled to a length."""
    cache = init_cache(spec, batch=rows)
    leaves, tree = jax.tree.flatten((cache.pages, cache.exact_keys, cache.exact_values))
    seeds = jax.random.split(jax.random.key(0), len(leaves))
    filled = [random_array(seed, leaf.shape, leaf.dtype) for seed, leaf in zip(seeds, leaves, strict=True)]
    pages, exact_keys, exact_values = tree.unflatten(filled)
    full = jnp.full(rows, length, jnp.int32)
    return dataclasses.replace(
        cache,
        pages=pages,
        exact_keys=exact_keys,
        exact_values=exact_values,
        length=full,
        compressed=full - spec.sinks - spec.ring,
    )
