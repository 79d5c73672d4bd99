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
        name: What is special about it.
        function: A function of arrays that launches Pallas Triton kernels, none of them interpreted.
        arguments: Shapes of its arguments.
        config: Its tiles, for a reader.
        expected: What the machine code of each kernel must contain, by the kernel's name; see
            `pallas_kernels.compat.compile.INSTRUCTIONS`.
        only: Names of the kernels to compile, where others have cases of their own; all if empty.
        donated: Numbers of the arguments that results overwrite.
        architectures: What it is compiled for; tiles may depend on the device.
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
        """Its kernels as Triton IR."""
        kernels = triton_kernels(lower_for_cuda(self.function, *self.arguments))
        return [kernel for kernel in kernels if not self.only or kernel.name in self.only]


def by_tiles(tiles: Callable[[int], Hashable]) -> dict[Any, list[str]]:
    """Architectures by what a function of compute capabilities, times ten, chooses for them; that of an H100 first.

    Example:
        >>> by_tiles(lambda capability: 64 if capability == 100 else 128)
        {128: ['sm_80', 'sm_86', 'sm_89', 'sm_90', 'sm_120'], 64: ['sm_100']}
    """
    found: dict[Any, list[str]] = {tiles(90): []}
    for name in ARCHITECTURES:
        found.setdefault(tiles(int(name.removeprefix("sm_"))), []).append(name)
    return found
