"""Compiles lowered Pallas Triton kernels for GPUs that need not be present, and measures their resources.

The `triton` package brings its own assembler; neither a GPU nor CUDA is needed.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.compat.lowering import TritonKernel

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Ampere, Ada, Hopper and Blackwell, data centre and desktop."""

INSTRUCTIONS = {
    "mma": r"mma\.sync\.aligned\.m16n8k32\S*\.s8\.s8|wgmma\S*s8\.s8",
    "half mma": r"mma\.sync\.aligned\.m16n8k16\S*\.f16|wgmma\S*\.f16|tcgen05\.mma\S*kind::f16",
    "prmt": r"prmt\.b32",
    "async": r"cp\.async",
}
"""PTX that kernels must contain, by name: tensor-core products of bytes or halves, lookups, asynchronous copies."""

KNOWN_TO_HOLD = ("3.6.0", "3.7.1")
"""Versions of the `triton` package with which every case of `tq-jax gate` is known to compile as it should."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel.

    Attributes:
        registers: Registers per thread.
        stack_bytes: Stack bytes per thread; in these kernels spilled registers alone are there.
        shared_bytes: Bytes of shared memory per program.
        instructions: Occurrences in the PTX of each name of INSTRUCTIONS.
        sass: Machine code as text; empty unless asked for.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    sass: str


def compile_for(kernel: TritonKernel, architecture: str, *, disassemble: bool = False) -> Compiled:
    """Compiles a lowered kernel.

    Args:
        kernel: From `pallas_kernels.compat.lowering.triton_kernels`.
        architecture: One of ARCHITECTURES.
        disassemble: Whether to fill in `sass`.

    Returns:
        The resources of the compiled kernel.

    Raises:
        ImportError: Without the `triton` package.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    tools = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ttir", Path(folder) / "kernel.cubin"
        source.write_text(kernel.ir)
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
        source.write_text(_optimized(source, target, options))
        built = triton.compile(str(source), target=target, options=options)
        cubin.write_bytes(built.asm["cubin"])
        usage = _run(tools / "cuobjdump", "-res-usage", cubin)
        sass = _run(tools / "nvdisasm", "-c", cubin) if disassemble else ""
    # Functions that the compiler adds to the kernel have lines of their own: the largest number counts.
    numbers = {name: max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in ("REG", "STACK", "LOCAL")}
    ptx = built.asm["ptx"]
    return Compiled(
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=built.metadata.shared,
        instructions={name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
        sass=sass,
    )


def _optimized(source: Path, target: Any, options: dict[str, int]) -> str:
    """The kernel after the passes over Triton IR that XLA runs, and that `triton.compile` skips if it is given IR."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend: Any = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = ir.parse_mlir_module(str(source), context)
    module.context = context
    return str(backend.make_ttir(module, {}, backend.parse_options(options), target.arch))


def _run(tool: Path, *arguments: str | Path) -> str:
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def is_known_to_hold(version: str) -> bool:
    """Whether the gate is known to hold for a version of the `triton` package; a suffix after "+" counts for nothing.

    Example:
        >>> is_known_to_hold("3.7.1+git1"), is_known_to_hold("3.7.10")
        (True, False)
    """
    return version.partition("+")[0] in KNOWN_TO_HOLD


def version_note(version: str) -> str:
    """Whether the gate is known to hold with a version of the `triton` package, for a reader.

    Example:
        >>> version_note("3.7.1")
        'the gate is known to hold for this version'
    """
    if is_known_to_hold(version):
        return "the gate is known to hold for this version"
    known = " and ".join(KNOWN_TO_HOLD)
    return f"the gate is known to hold for {known}, and newer versions to spill a few bytes in some kernels"


def missing(compiled: Compiled, expected: Sequence[str]) -> list[str]:
    """Names of the expected instructions that the kernel does not have.

    Args:
        compiled: The kernel.
        expected: Names of INSTRUCTIONS.
    """
    return [name for name in expected if not compiled.instructions[name]]
