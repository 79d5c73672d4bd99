"""One engine of vLLM in a process of its own: starts it, measures it, and writes a JSON line per measurement.

    python -m interop.vllm.serve_bench.engine JOB.json LINES.jsonl

The parent, `interop.vllm.serve_bench.processes`, writes the job. Prompts are random token ids, requests decode greedily
without stop tokens, and nothing is taken from the prefix cache.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG = 32768
"""Tokens of the requests that are counted by how many of them fit the cache."""

STOPPED = "stopped, because the time of --limit was over"
"""The message of measurements that were not finished in time."""

SAID_EVERY = 5.0
"""Seconds between two lines about the progress of many requests."""

SHORT = 1024
"""Tokens of prompts that only warm up."""

WARM_UP = 4
"""Tokens that each request of a load generates before it is measured, so that kernels are compiled."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Measurements of one engine, as plain data.

    Attributes:
        arguments: Arguments of vLLM's `LLM`.
        attention: Name of the backend that layers must have; None for any.
        loads: Pairs of batch and context, tokens per request.
        output: Tokens that each request of a load generates.
        requests: Requests whose throughput is measured; 0 for none.
        together: How many of these requests are in the engine at a time.
        request_input: Tokens of the prompt of each of them.
        request_output: Tokens that each of them generates.
        deadline: Seconds since the epoch at which measurements stop.
        fit: Tokens of the prompts of which as many as fit the cache run together; 0 for none.
        served_s: Seconds after which the requests whose throughput is measured are cut off.
    """

    arguments: dict[str, Any]
    attention: str | None
    loads: list[tuple[int, int]]
    output: int
    requests: int
    together: int
    request_input: int
    request_output: int
    deadline: float
    fit: int = 0
    served_s: float = math.inf


Tell = Callable[[dict[str, Any]], None]
"""Takes a result, plain data."""


class Bench:
    """A started engine.

    Args:
        job: What to measure.

    Attributes:
        job: What to measure.
        about: Device, versions, capacity, layers and seconds of the start.

    Raises:
        NotImplementedError: If vLLM's layers have another attention backend than the one that was asked for.
    """

    def __init__(self, job: Job) -> None:
        import torch

        vllm: Any = importlib.import_module("vllm")
        make = vllm.LLM  # imports the most of vLLM, which no cache can make faster
        begun = time.perf_counter()
        self.llm: Any = make(**job.arguments)
        start_s = round(time.perf_counter() - begun, 1)
        self.engine, config = self.llm.llm_engine, self.llm.llm_engine.vllm_config
        self.vocabulary, self._numbers = config.model_config.get_vocab_size(), 0
        self.job = job
        cuda, cache = torch.cuda.is_available(), config.cache_config
        known = getattr(cache, "kv_cache_size_tokens", None)
        self.tokens = cache.num_gpu_blocks * cache.block_size if known is None else known
        self.about = {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "start_s": start_s,
            "kv_tokens": self.tokens,
            "requests_32k": self.tokens // LONG,
            "block_size": cache.block_size,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "graphs": str(config.compilation_config.cudagraph_mode),
            "layers": self._layers(),
        }
        if job.attention is not None and job.attention not in self.about["layers"]:
            raise NotImplementedError(
                f"expected layers with attention {job.attention}, got {self.about['layers']}: this vLLM does not offer "
                "it for this model and device"
            )

    def _layers(self) -> dict[str, int]:
        """How many layers have each attention backend."""

        def look(worker: Any) -> list[str]:
            layers = worker.vllm_config.compilation_config.static_forward_context.values()
            return [layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")]

        names = self.llm.collective_rpc(look)[0]
        return {name: names.count(name) for name in sorted(set(names))}

    def add(self, context: int, output: int, draw: random.Random) -> str:
        """Adds a request with a random prompt; returns its name."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._numbers += 1
        ids = [draw.randrange(3, self.vocabulary) for _ in range(context)]
        sampling = SamplingParams(
            temperature=0, max_tokens=output, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self.engine.add_request(str(self._numbers), {"prompt_token_ids": ids}, sampling)
        return str(self._numbers)

    def step(self) -> dict[str, int]:
        """Runs a step; returns the number of new tokens of each request that has some."""
        found = self.engine.step()
        return {one.request_id: len(one.outputs[0].token_ids) for one in found if one.outputs[0].token_ids}

    def load(self, batch: int, context: int, output: int, *, warm: int | None = None) -> dict[str, Any]:
        """Runs requests of one length all at once: seconds of their prompts, and milliseconds per step.

        The load runs before it is measured, so that its kernels are compiled. A step counts if every request decodes in
        it.

        Args:
            batch: Number of requests.
            context: Tokens of each prompt.
            output: Tokens that each request generates.
            warm: Tokens of each prompt of the run before; by default `context`.

        Raises:
            ValueError: If the requests do not fit the cache together, or no two steps count.
            TimeoutError: If the time is over.
        """
        needed = batch * (context + output)
        if needed > self.tokens:
            raise ValueError(f"expected a cache of at least {needed} tokens for {batch} requests, got {self.tokens}")
        self._run(batch, context if warm is None else warm, WARM_UP)
        prefill_s, gaps = self._run(batch, context, output)
        if not gaps:
            raise ValueError(f"expected steps in which all {batch} requests decode, got none")
        median = statistics.median(gaps)
        return {
            "decode_ms": round(1e3 * median, 4),
            "decode_ms_min": round(1e3 * min(gaps), 4),
            "decode_steps": len(gaps),
            "decode_tokens_s": round(batch / median, 2),
            "prefill_s": round(prefill_s, 4),
        }

    def load_that_fits(self) -> dict[str, Any]:
        """Runs as many requests as fit the cache all at once; the fields of their row.

        The first request generates a token in every step of the prompts after it, so each has room for these.
        """
        context, arguments = self.job.fit, self.job.arguments
        row: dict[str, Any] = {"fit": True, "context": context}
        batch = fitting(
            self.tokens - self.about["block_size"], self.about["block_size"], context, self.job.output,
            chunk=arguments["max_num_batched_tokens"], most=arguments["max_num_seqs"],
        )  # fmt: skip
        if not batch:
            return row | {"error": f"expected a cache of more than {context} tokens, got {self.tokens}"}
        output = batch * steps_of_prompt(context, arguments["max_num_batched_tokens"]) + self.job.output
        return row | {"batch": batch} | self.load(batch, context, output, warm=min(SHORT, context))

    def _run(self, batch: int, context: int, output: int) -> tuple[float, list[float]]:
        """Seconds of the prompts, and of every step after them in which all requests decode."""
        draw = random.Random(context * 1000 + batch)
        names = [self.add(context, output, draw) for _ in range(batch)]
        begun = time.perf_counter()
        first, steps = {}, []
        while self.engine.has_unfinished_requests():
            if time.time() > self.job.deadline:
                self.engine.abort_request(names)
                raise TimeoutError(STOPPED)
            new = self.step()
            now = time.perf_counter()
            first = dict.fromkeys(new, now) | first
            steps.append((now, sum(new.values())))
        prompts = max(first.values())
        whole = [now for now, count in steps if now >= prompts and count == batch]
        return prompts - begun, [after - before for before, after in itertools.pairwise(whole)]

    def throughput(self, tell: Tell) -> dict[str, Any]:
        """Runs many requests, so many at a time: a request that ends makes room for the next one.

        When the time is over, the requests that run are aborted, and their tokens so far count.

        Args:
            tell: Called with the progress every few seconds.

        Raises:
            TimeoutError: If the time is over before the first of them.
        """
        job = self.job
        self._run(1, job.request_input, WARM_UP)
        draw, waiting = random.Random(1), job.requests
        added: dict[str, float] = {}
        first: dict[str, float] = {}
        counts: dict[str, int] = {}
        begun = said = time.perf_counter()
        while time.time() < job.deadline and time.perf_counter() - begun < job.served_s:
            if time.perf_counter() - said > SAID_EVERY:
                said = time.perf_counter()
                tell({"progress": f"{sum(counts.values()):,} of {job.requests * job.request_output:,} tokens"})
            running = len(added) - sum(count == job.request_output for count in counts.values())
            for _ in range(min(waiting, job.together - running)):
                added[self.add(job.request_input, job.request_output, draw)] = time.perf_counter()
                waiting -= 1
            if not self.engine.has_unfinished_requests():
                break
            for name, count in self.step().items():
                first.setdefault(name, time.perf_counter())
                counts[name] = counts.get(name, 0) + count
        seconds = time.perf_counter() - begun
        self.engine.abort_request([name for name in added if counts.get(name, 0) < job.request_output])
        finished = sum(count == job.request_output for count in counts.values())
        prompts = len(first) * job.request_input
        waits = [first[name] - added[name] for name in first]
        return {
            "finished": finished,
            "seconds": round(seconds, 4),
            "tokens_s": round(sum(counts.values()) / seconds, 2),
            "all_tokens_s": round((sum(counts.values()) + prompts) / seconds, 2),
            "first_token_s": round(statistics.median(waits), 3) if waits else None,
            "complete": finished == job.requests,
        }


def steps_of_prompt(context: int, chunk: int) -> int:
    """Steps of a prompt of so many tokens, of which a step takes at most a chunk."""
    return -(-context // chunk)


def fitting(tokens: int, block: int, context: int, output: int, *, chunk: int, most: int) -> int:
    """How many requests fit a cache, if each also generates tokens during the prompts of all others.

    Args:
        tokens: Tokens that the cache holds.
        block: Tokens per block; requests share no block.
        context: Tokens of each prompt.
        output: Tokens that each request generates after all prompts.
        chunk: Most tokens per step.
        most: Most requests.

    Example:
        >>> fitting(10_000, 64, 1000, 40, chunk=512, most=64)
        9
    """

    def needed(batch: int) -> int:
        longest = context + batch * steps_of_prompt(context, chunk) + output
        return batch * -(-longest // block) * block

    return max((batch for batch in range(most + 1) if needed(batch) <= tokens), default=0)


def run(job: Job, tell: Tell) -> None:
    """Starts an engine and measures it; a measurement that fails is told and stops nothing.

    Args:
        job: What to measure.
        tell: Called with each result, plain data.
    """
    bench = Bench(job)
    tell({"about": bench.about})
    given = ("requests", "together", "request_input", "request_output")
    named = {"op": "vllm_throughput"} | {name: getattr(job, name) for name in given}
    jobs: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = [
        ({"batch": b, "context": c}, functools.partial(bench.load, b, c, job.output)) for b, c in job.loads
    ]
    jobs += [({"fit": True, "context": job.fit}, bench.load_that_fits)] if job.fit else []
    jobs += [(named, functools.partial(bench.throughput, tell))] if job.requests else []
    for row, measure in jobs:
        if time.time() > job.deadline:
            return
        try:
            found = measure()
        except (ValueError, TimeoutError) as error:
            found = {"error": str(error)}
        tell({"row": row | found})


def main(source: str, target: str) -> int:
    """Runs the job of a file; returns the exit code."""
    job = Job(**json.loads(Path(source).read_text()))
    with open(target, "a", encoding="utf-8") as lines:

        def tell(result: dict[str, Any]) -> None:
            lines.write(json.dumps(result) + "\n")
            lines.flush()

        try:
            run(job, tell)
        except Exception as error:  # an engine that does not start is a result
            import traceback

            traceback.print_exc()
            tell({"error": f"{type(error).__name__}: {error}"})
            return 1
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # vLLM's own shutdown may wait for its threads
