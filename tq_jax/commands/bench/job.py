"""Interface of the benchmarks: the setting that they get, and the jobs that they give."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tq_jax.commands.bench.peers import Peer

Row = dict[str, Any]
"""One measurement, as plain data."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The device that a benchmark runs on, and the peers it is compared with.

    Attributes:
        gpu: Whether JAX has an NVIDIA GPU. Without a GPU, small shapes run on the reference.
        copy_gbps: GB/s, read plus written, of a large copy in this run.
        matmul_tflops: Tera-operations per second of a large bfloat16 matrix product in this run.
        peers: The peers that can run on this machine.
    """

    gpu: bool
    copy_gbps: float
    matmul_tflops: float
    peers: tuple[Peer, ...] = ()

    def floor(self, us: float, nbytes: int, operations: int = 0) -> Row:
        """Fields of a row that compare its time with the hardware's limits.

        Args:
            us: The time, microseconds.
            nbytes: Bytes that must be read and written.
            operations: Multiplications and additions that must be done.

        Example:
            >>> Setting(gpu=False, copy_gbps=1000.0, matmul_tflops=1.0).floor(3.0, 2_000_000, 10)
            {'bytes': 2000000, 'floor_us': 2.0, 'over_floor': 1.5}
        """
        floor = max(nbytes / self.copy_gbps / 1e3, operations / self.matmul_tflops / 1e6)
        return {"bytes": nbytes, "floor_us": round(floor, 2), "over_floor": round(us / floor, 3)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        label: What is measured.
        run: Measures and yields rows. Each row has "op", "impl" and "us", usually "bytes" and "floor_us", and if it is
            a row of this project's kernels "ok": whether the result agrees with the reference.
        peer: Whether the job measures another project's implementation, whose failure does not fail the benchmark.
    """

    label: str
    run: Callable[[], Iterator[Row]]
    peer: bool = False
