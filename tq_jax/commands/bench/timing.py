"""Timers: GPU kernels by CUPTI, whole calls by the clock."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compat.device import gpu_kernel_times

ITERATIONS, QUEUE = 9, 24
"""Number of timed runs, and of calls in a queue."""

ROTATED_BYTES = 250e6
"""Bytes that calls read before they read the same bytes again: five times the L2 cache of an H100."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians over iterations.

    Attributes:
        us: Microseconds per call: of its GPU kernels, or of the whole call if there is no GPU.
        end_to_end_us: Microseconds per call in a queue of calls, dispatched by JAX or replayed from a CUDA graph.
        kernels: Microseconds per call of each kernel.
    """

    us: float
    end_to_end_us: float
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The figures, rounded, as fields of a row."""
        kernels = {name: round(us, 2) for name, us in self.kernels.items()}
        return {"us": round(self.us, 2), "end_to_end_us": round(self.end_to_end_us, 2), "kernels": kernels}


def num_copies(nbytes: int) -> int:
    """Number of inputs to rotate, so that none is in the GPU's cache when it is read again.

    Example:
        >>> num_copies(100_000_000), num_copies(10**9)
        (3, 1)
    """
    return max(1, min(8, -int(-ROTATED_BYTES // nbytes)))


def time_jax(function: Callable, inputs: list[tuple]) -> Timing:
    """Times a jitted function on several inputs in turn.

    Args:
        function: Returns arrays.
        inputs: Positional arguments of each call.
    """

    def run(repeats: int = 1) -> None:
        jax.block_until_ready([function(*arguments) for arguments in inputs * repeats])

    return time_runs(run, len(inputs))


def time_runs(run: Callable[[int], Any], calls: int) -> Timing:
    """Times a function that makes several JAX calls, repeats them, and waits for all.

    Args:
        run: The function; its argument is the number of repetitions.
        calls: Number of calls per repetition.
    """
    if jax.default_backend() != "gpu":
        wall = median_time(functools.partial(run, 1), calls)
        return Timing(wall, wall)
    kernels = kernel_times(functools.partial(run, 1), calls)
    repeats = -(-QUEUE // calls)
    wall = median_time(functools.partial(run, repeats), repeats * calls)
    return Timing(sum(kernels.values()), wall, kernels)


def time_torch(calls: Sequence[Callable[[], Any]]) -> Timing:
    """Times torch calls on a GPU: their kernels, and end to end by replays of a CUDA graph of all calls.

    Args:
        calls: The same operation on several inputs.
    """
    import torch

    def run() -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replays = []
    for _ in range(ITERATIONS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        replays.append(start.elapsed_time(stop) * 1e3 / len(calls))
    kernels = kernel_times(run, len(calls))
    return Timing(sum(kernels.values()), statistics.median(replays), kernels)


def kernel_times(run: Callable[[], Any], calls: int) -> dict[str, float]:
    """Median microseconds per call of every GPU kernel, by name, of a function that makes calls and waits for them.

    Args:
        run: The function.
        calls: Number of calls that it makes.

    Raises:
        RuntimeError: If runs launch different kernels.
    """
    run()
    timed = gpu_kernel_times(lambda: [run() for _ in range(ITERATIONS)])
    if not timed or len(timed) % ITERATIONS:
        raise RuntimeError(f"expected the same kernels in each of {ITERATIONS} runs, got {len(timed)} kernels")
    size = len(timed) // ITERATIONS
    sums: dict[str, list[float]] = {}
    for index, (name, milliseconds) in enumerate(timed):
        totals = sums.setdefault(name[:80], [0.0] * ITERATIONS)
        totals[index // size] += milliseconds * 1e3 / calls
    return {name: statistics.median(totals) for name, totals in sums.items()}


def median_time(run: Callable[[], Any], calls: int = 1) -> float:
    """Median microseconds per call, by the clock, of a function that makes calls and waits for them.

    Args:
        run: The function.
        calls: Number of calls that it makes.
    """
    run()
    times = []
    for _ in range(ITERATIONS):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) / calls * 1e6)
    return statistics.median(times)


def copy_gbps(nbytes: int) -> float:
    """Speed of a copy that adds 1 to an array of `nbytes` bytes: GB/s, read plus written, to four digits."""
    x = jnp.zeros(nbytes // 4, jnp.float32)
    return float(f"{2 * x.nbytes / time_jax(jax.jit(lambda x: x + 1), [(x,)]).us / 1e3:.4g}")


def matmul_tflops(size: int) -> float:
    """Speed of a bfloat16 product of random square matrices: tera-operations per second, to four digits."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    return float(f"{2 * size**3 / time_jax(jax.jit(jnp.dot), [(a, b)]).us / 1e6:.4g}")
