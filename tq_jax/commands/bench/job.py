"""What an operation's benchmark is given and what it gives."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tq_jax.commands.bench.peers import Peer

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and against what a benchmark runs.

    Attributes:
        gpu: Whether JAX has an NVIDIA GPU. Without one small shapes run on the reference.
        copy_gbps: GB/s, read plus written, of a large copy in this run.
        matmul_tflops: Tera-operations a second of a large bfloat16 matrix product in this run.
        peers: The peers that can run here.
    """

    gpu: bool
    copy_gbps: float
    matmul_tflops: float
    peers: tuple[Peer, ...] = ()

    def floor(self, us: float, nbytes: int, operations: int = 0) -> Row:
        """The part of a row that says how near to the hardware's limits so many microseconds are.

        Args:
            us: The time.
            nbytes: Bytes that have to be read and written.
            operations: Multiplications and additions that have to be done.

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
        run: Measures it and yields rows, each with "op", "impl" and "us", as a rule with "bytes" and "floor_us", and if
            it is this project's with "ok": whether it agrees with the reference.
        peer: Whether it measures somebody else's implementation, whose failure is none of this project's.
    """

    label: str
    run: Callable[[], Iterator[Row]]
    peer: bool = False
