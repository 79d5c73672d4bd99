"""Measurements of one decoder at a time: tokens of a compiled decode loop, and prompts."""

import dataclasses
import gc
import re
import statistics
import time
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import tq_jax as tq
from tq_jax.commands.bench.job import Row, Setting
from tq_jax.commands.bench.model import floors, many
from tq_jax.commands.bench.model.filling import append_random
from tq_jax.commands.bench.model.placement import device_bytes
from tq_jax.commands.bench.model.plan import Plan, Task
from tq_jax.commands.bench.model.shapes import random_decoder
from tq_jax.models import Decoder
from tq_jax.models.generate import PROMPT_CHUNK, prefill_step
from tq_jax.models.layer_caches import Caches, map_caches, parts_of
from tq_jax.models.mesh_step import run_step
from tq_jax.models.prompt import run_in_chunks
from tq_jax.models.sampling import Sampling
from tq_jax.models.sharding import Layout, shard

REPEATS = 3
"""Timed runs, after one that is not timed."""

ENOUGH_SECONDS = 6.0
"""Time after which a prompt is not run again."""

CHUNK_NUMBERS, CHUNK_TOKENS = 2**27, 2048
"""Most numbers per array, and most tokens per sequence, that are appended at once to fill a cache."""


def memory_stats() -> dict[str, int]:
    """What the device says of its memory; empty if it says nothing, as a CPU does."""
    return jax.devices()[0].memory_stats() or {}


@dataclasses.dataclass
class Lab:
    """The decoder that is measured, and what was measured so far.

    Attributes:
        setting: The device, and its speeds in this run.
        plan: What to measure.
        rows: All rows so far.
    """

    setting: Setting
    plan: Plan
    rows: list[Row] = dataclasses.field(default_factory=list)
    _held: tuple[str, Decoder] | None = None

    def decoder(self, shape: str) -> Decoder:
        """The decoder of a name; the one before it is freed first.

        Args:
            shape: The name.
        """
        if self._held is None or self._held[0] != shape:
            if self._held is not None:
                self._held = None
                jax.clear_caches()
                gc.collect()
            made = self._made(shape)
            self._held = shape, jax.block_until_ready(made)
        return self._held[1]

    def _made(self, shape: str) -> Decoder:
        layout, loaded = self.plan.placement.layout, self.plan.loaded
        if loaded is not None:
            return loaded if layout is None else shard(loaded, layout.mesh, axes=layout.axes)
        return random_decoder(self.plan.configs[shape], jnp.dtype(self.plan.dtype), layout=layout)

    def attempt(self, task: Task) -> Row:
        """The row of a task; if it fails, the row says in words why.

        Args:
            task: The task.
        """
        row = {**task.as_dict(), **self.plan.placement.as_dict(), "impl": "triton" if self.setting.gpu else "reference"}
        try:
            row |= self._measured(task)
        except Exception as error:
            row |= explain(error)
            if not row["out_of_memory"]:
                traceback.print_exc()
        gc.collect()  # a failure may have left arrays in circles
        self.rows.append(row)
        return row

    def _measured(self, task: Task) -> Row:
        if task.op == "many":
            return many.measure(self.decoder(task.shape), task)
        return self._prompt(task) if task.op == "prompt" else self._tokens(task)

    def _tokens(self, task: Task) -> Row:
        """Times tokens of the compiled decode loop, the last of which attends to `task.seq` tokens."""
        decoder, steps, peak = self.decoder(task.shape), self.plan.steps, memory_stats().get("peak_bytes_in_use", 0)
        spec, placement = task.kind.spec(decoder.config, max(self.plan.capacity or 0, task.seq)), self.plan.placement
        arrays = {"first": jnp.zeros(task.batch, jnp.int32), "keys": _keys(task.batch), "stop": jnp.zeros(0, jnp.int32)}
        started = time.perf_counter()
        options: dict[str, Any] = dict(sampling=Sampling(), max_new_tokens=steps + 1, implementation="auto")
        shapes = placement.cache_shapes(decoder, spec, task.batch)
        loop, temporary = placement.compile_loop(decoder, shapes, arrays, **options)
        compiled = time.perf_counter()
        make = placement.cache_maker(decoder, spec, task.batch)
        cache = jax.block_until_ready(self._filled(decoder, make(), task, task.seq - steps))
        filled, nbytes, seconds = time.perf_counter(), device_bytes(cache), []
        counters = jax.device_get([(one.length, one.compressed) for one in parts_of(cache)])
        for _ in range(1 + REPEATS):
            # Every run starts from the same number of tokens; which tokens they are changes no time.
            cache = with_counters(cache, counters)
            jax.block_until_ready(cache)
            begun = time.perf_counter()
            _, count, cache = jax.block_until_ready(loop(cache))
            seconds.append(time.perf_counter() - begun)
        tokens = self._tokens_held(cache)
        ends = jax.device_get((count - 1 - steps, tokens - task.seq, cache.overflow))
        if any(end.any() for end in ends):
            raise RuntimeError(f"expected {steps} new tokens that end at {task.seq}, got other numbers")
        step = statistics.median(seconds[1:]) / steps
        weights = floors.all_weights(decoder)
        extra = [temporary, _growth(peak) - weights - nbytes]
        row = {"us": round(step * 1e6, 1), "tokens_per_s": round(task.batch / step, 1)}
        row |= self._floor(decoder, task, step * 1e6)
        row |= {"weights_bytes": weights, "cache_bytes": nbytes, "overhead_bytes": max(0, *extra)}
        row |= {"compile_s": round(compiled - started, 1), "fill_s": round(filled - compiled, 1), "steps": steps}
        return row | {"capacity": spec.max_tokens, "dtype": str(floors.weight_dtype(decoder))}

    def _tokens_held(self, cache: Caches) -> jax.Array:
        """Tokens of every row of a cache, on all devices that share them."""
        layout = self.plan.placement.layout
        return jnp.sum(cache.length.reshape(1 if layout is None else layout.shares, -1), axis=0)

    def _floor(self, decoder: Decoder, task: Task, us: float) -> Row:
        """The floor of a step: the weights and the cache that it reads on a device, at the speed of a copy."""
        mean = task.seq - (self.plan.steps - 1) / 2  # tokens that a step attends to, on average
        weights, cache = floors.read_weights(decoder), task.kind.read_bytes(decoder.config, mean, task.batch)
        cache = round(cache / self.plan.placement.devices)
        return {"read_weights_bytes": weights, "read_cache_bytes": cache} | self.setting.floor(us, weights + cache)

    def _filled(self, decoder: Decoder, cache: Caches, task: Task, tokens: int) -> Caches:
        """The cache with so many tokens per sequence; it is donated."""
        layout = self.plan.placement.layout
        if self.plan.fill == "prompt":
            return _read(decoder, cache, task.batch, tokens, layout)
        numbers = cache.rows * cache.spec.num_kv_heads * cache.spec.head_dim
        chunk = min(tokens, max(16, min(CHUNK_TOKENS, CHUNK_NUMBERS // numbers) // 16 * 16))
        for start in range(0, tokens, chunk):
            arrays = {"start": jnp.int32(start), "count": jnp.int32(min(chunk, tokens - start))}
            arrays |= {"key": jax.random.key(start)}
            [cache] = run_step(append_random, decoder, layout, cache=cache, arrays=arrays, options={"chunk": chunk})
        return cache

    def _prompt(self, task: Task) -> Row:
        """Times prompts, each into an empty cache."""
        decoder, seconds, peak = self.decoder(task.shape), [], memory_stats().get("peak_bytes_in_use", 0)
        placement = self.plan.placement
        make = placement.cache_maker(decoder, task.kind.spec(decoder.config, task.seq), task.batch)
        while len(seconds) < 2 or (len(seconds) <= REPEATS and sum(seconds[1:]) < ENOUGH_SECONDS):
            cache = jax.block_until_ready(make())
            begun = time.perf_counter()
            _read(decoder, cache, task.batch, task.seq, placement.layout)
            seconds.append(time.perf_counter() - begun)
            del cache
        found = statistics.median(seconds[1:])
        operations = floors.prompt_operations(decoder.config, task.seq, task.batch)
        floor = operations / placement.devices / self.setting.matmul_tflops / 1e12
        row = {"s": float(f"{found:.4g}"), "floor_s": float(f"{floor:.4g}"), "over_floor": round(found / floor, 3)}
        row |= {"tokens_per_s": round(task.batch * task.seq / found, 1), "operations": operations}
        return row | {"peak_bytes": _growth(peak), "compile_s": round(seconds[0] - found, 1), "runs": len(seconds) - 1}


def _read(decoder: Decoder, cache: Caches, batch: int, tokens: int, layout: Layout | None) -> Caches:
    """The cache after a prompt of random tokens, in chunks if it is as long as `generate` cuts; it is donated."""
    ids = jax.random.randint(jax.random.key(1), (batch, tokens), 0, decoder.config.vocab_size, jnp.int32)
    arrays = {"tokens": ids, "lengths": jnp.full(batch, tokens, jnp.int32), "keys": _keys(batch)}
    if tokens > PROMPT_CHUNK:
        options: dict[str, Any] = dict(sampling=Sampling(), implementation="auto", precise=False)
        found = run_in_chunks(decoder, cache=cache, chunk=PROMPT_CHUNK, layout=layout, **arrays, **options)
    else:
        options = {"sampling": Sampling()}
        found = run_step(prefill_step, decoder, layout, cache=cache, arrays=arrays, options=options)
    return jax.block_until_ready(found)[1]


def with_counters(cache: Caches, counters: Sequence[tuple[Any, Any]]) -> Caches:
    """The cache with other numbers of tokens: `length` and `compressed` of each of its parts."""
    rest = iter(counters)

    def change(one: tq.Cache) -> tq.Cache:
        length, compressed = next(rest)
        counts = (jax.device_put(count, one.length.sharding) for count in (length, compressed))
        return dataclasses.replace(one, **dict(zip(("length", "compressed"), counts, strict=True)))

    return map_caches(change, cache)


def _keys(batch: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), batch)


def _growth(before: int) -> int:
    """The device's peak of memory if it has grown; 0 if the peak is older, for then it says nothing."""
    peak = memory_stats().get("peak_bytes_in_use", 0)
    return peak if peak > before else 0


def explain(error: Exception) -> Row:
    """A failure as fields of a row, in words.

    Args:
        error: The failure.

    Example:
        >>> explain(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34.00GiB."))
        {'error': 'out of memory: 34.00GiB could not be allocated', 'out_of_memory': True}
        >>> explain(NotImplementedError("no kernel reads 5 bits"))
        {'error': 'NotImplementedError: no kernel reads 5 bits', 'out_of_memory': False}
    """
    text = " ".join(str(error).split())
    full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    if not full:
        return {"error": f"{type(error).__name__}: {text}"[:400], "out_of_memory": False}
    size = re.search(r"allocat\w+ (\d[\d.]*\s?(?:[KMGT]?i?B|bytes))", text)
    return {"error": "out of memory" + (f": {size[1]} could not be allocated" if size else ""), "out_of_memory": True}
