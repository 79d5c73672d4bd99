"""One function that `tq-jax gate` lowers and compiles, and for which GPUs."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from pallas_kernels.compat.compile import ARCHITECTURES
from pallas_kernels.compat.lowering import TritonKernel, lower_for_cuda, triton_kernels


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to lower and compile.

    Attributes:
        name: What distinguishes the case.
        function: A function of arrays that launches Pallas Triton kernels without interpreting them.
        arguments: Shapes of its arguments.
        config: Its tiles, for a reader.
        expected: Instructions that the machine code of each kernel must contain, by the kernel's name; see
            `pallas_kernels.compat.compile.INSTRUCTIONS`.
        only: Names of the kernels to compile, if the function launches kernels that other cases cover; all if empty.
        donated: Indices of the arguments that results overwrite.
        architectures: Architectures it is compiled for; tiles may depend on the device.
        quick: Whether it is compiled by default.
    """

    name: str
    function: Callable
    arguments: tuple
    config: str = ""
    expected: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    only: Sequence[str] = ()
    donated: Sequence[int] = ()
    architectures: Sequence[str] = ARCHITECTURES
    quick: bool = False

    def lower(self) -> list[TritonKernel]:
        """The kernels of the case as Triton IR."""
        kernels = triton_kernels(lower_for_cuda(self.function, *self.arguments))
        return [kernel for kernel in kernels if not self.only or kernel.name in self.only]


def by_tiles(tiles: Callable[[int], Hashable]) -> dict[Any, list[str]]:
    """Groups architectures by the tiles that a function of the compute capability (times ten) chooses; an H100's first.

    Example:
        >>> by_tiles(lambda capability: 64 if capability == 100 else 128)
        {128: ['sm_80', 'sm_86', 'sm_89', 'sm_90', 'sm_120'], 64: ['sm_100']}
    """
    found: dict[Any, list[str]] = {tiles(90): []}
    for name in ARCHITECTURES:
        found.setdefault(tiles(int(name.removeprefix("sm_"))), []).append(name)
    return found
