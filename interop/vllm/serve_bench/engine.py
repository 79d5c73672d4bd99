"""One engine of vLLM in a process of its own: starts it, measures it, and writes a JSON line per measurement.

    python -m interop.vllm.serve_bench.engine JOB.json LINES.jsonl

The parent, `interop.vllm.serve_bench.processes`, writes the job. Prompts are random token ids, requests decode greedily
without stop tokens, and nothing is taken from the prefix cache.
"""

import dataclasses
import importlib
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

LONG = 32768
"""Tokens of the requests that are counted by how many of them fit the cache."""

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
        deadline: Seconds since the epoch after which nothing is started.
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


class Bench:
    """A started engine.

    Args:
        job: What to measure.

    Attributes:
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

    def load(self, batch: int, context: int, output: int) -> dict[str, Any]:
        """Runs requests of one length all at once: seconds of their prompts, and milliseconds per step.

        The load runs before it is measured, so that its kernels are compiled. A step counts if every request decodes in
        it.

        Args:
            batch: Number of requests.
            context: Tokens of each prompt.
            output: Tokens that each request generates.

        Raises:
            ValueError: If the requests do not fit the cache together, or no two steps count.
        """
        needed = batch * (context + output)
        if needed > self.tokens:
            raise ValueError(f"expected a cache of at least {needed} tokens for {batch} requests, got {self.tokens}")
        self._run(batch, context, WARM_UP)
        prefill_s, gaps = self._run(batch, context, output)
        if not gaps:
            raise ValueError(f"expected steps in which all {batch} requests decode, got none")
        return {
            "decode_ms": round(1e3 * statistics.median(gaps), 4),
            "decode_ms_min": round(1e3 * min(gaps), 4),
            "decode_steps": len(gaps),
            "prefill_s": round(prefill_s, 4),
        }

    def _run(self, batch: int, context: int, output: int) -> tuple[float, list[float]]:
        """Seconds of the prompts, and of every step after them in which all requests decode."""
        draw = random.Random(context * 1000 + batch)
        for _ in range(batch):
            self.add(context, output, draw)
        begun = time.perf_counter()
        first, steps = {}, []
        while self.engine.has_unfinished_requests():
            new = self.step()
            now = time.perf_counter()
            first = dict.fromkeys(new, now) | first
            steps.append((now, sum(new.values())))
        prompts = max(first.values())
        whole = [now for now, count in steps if now >= prompts and count == batch]
        return prompts - begun, [after - before for before, after in itertools.pairwise(whole)]

    def throughput(self, job: Job) -> dict[str, Any]:
        """Runs many requests, so many at a time: a request that ends makes room for the next one.

        If the deadline passes, the requests that run are aborted, and their tokens so far count.
        """
        draw, waiting = random.Random(1), job.requests
        added: dict[str, float] = {}
        first: dict[str, float] = {}
        counts: dict[str, int] = {}
        begun = time.perf_counter()
        while time.time() < job.deadline:
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


def run(job: Job, tell: Any) -> None:
    """Starts an engine and measures it; a measurement that fails is told and stops nothing.

    Args:
        job: What to measure.
        tell: Called with each result, plain data.
    """
    bench = Bench(job)
    tell({"about": bench.about})
    for batch, context in job.loads:
        row: dict[str, Any] = {"batch": batch, "context": context}
        if time.time() > job.deadline:
            return
        try:
            row |= bench.load(batch, context, job.output)
        except ValueError as error:
            row["error"] = str(error)
        tell({"row": row})
    if job.requests and time.time() < job.deadline:
        given = ("requests", "together", "request_input", "request_output")
        named = {"op": "vllm_throughput"} | {name: getattr(job, name) for name in given}
        tell({"row": named | bench.throughput(job)})


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
