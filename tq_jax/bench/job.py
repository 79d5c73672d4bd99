"""What an operation's benchmark is given and what it gives."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tq_jax.bench.peers import Peer

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and against what a benchmark runs.

    Attributes:
        gpu: Whether JAX has an NVIDIA GPU. Without one small shapes run on the reference.
        copy_gbps: GB/s, read plus written, of a large copy in this run.
        peers: The peers that can run here.
    """

    gpu: bool
    copy_gbps: float
    peers: tuple[Peer, ...] = ()

    def floor_us(self, nbytes: int) -> float:
        """Microseconds that reading so many bytes takes at the speed of the copy.

        Example:
            >>> Setting(gpu=False, copy_gbps=1000.0).floor_us(2_000_000)
            2.0
        """
        return nbytes / self.copy_gbps / 1e3


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
