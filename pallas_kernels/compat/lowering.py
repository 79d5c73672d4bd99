"""Lowering of Pallas kernels to Triton IR, without a GPU: kernels become custom calls that carry the IR."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src.lib import triton as _triton  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]

from pallas_kernels.compat.device import H100_MULTIPROCESSORS
from pallas_kernels.compat.versions import LOWERING_NAMES_DEVICE

ABSTRACT_DEVICE_KIND = "NVIDIA H100 80GB HBM3"
"""A device kind that JAX knows; the Triton IR of these kernels is the same for every device."""


@dataclasses.dataclass(frozen=True)
class TritonKernel:
    """A lowered Pallas kernel before compilation.

    Attributes:
        name: Name of the kernel.
        ir: Triton IR as text.
        grid: Programs along x, y and z.
        num_warps: Warps per program.
        num_stages: Stages of software pipelining.
    """

    name: str
    ir: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int


@contextlib.contextmanager
def _abstract_gpu() -> Iterator[None]:
    """Lets Pallas lower for CUDA where no GPU is attached."""
    sharding = jax.sharding
    if not LOWERING_NAMES_DEVICE or jax.default_backend() == "gpu":
        yield
        return
    device = sharding.AbstractDevice(device_kind=ABSTRACT_DEVICE_KIND, num_cores=H100_MULTIPROCESSORS, platform="gpu")
    mesh = sharding.AbstractMesh((1,), ("gpu",), (sharding.AxisType.Auto,), abstract_device=device)
    with sharding.use_abstract_mesh(mesh):
        yield


def lower_for_cuda(function: Callable, *arguments: Any, donated: Sequence[int] = ()) -> Any:
    """Lowers a function of arrays (or of their `jax.ShapeDtypeStruct`) for NVIDIA GPUs, with or without one.

    Args:
        function: Function to trace, of arrays alone.
        *arguments: Pytrees of arrays or shapes.
        donated: Numbers of the arguments that results may overwrite.

    Returns:
        The `jax.stages.Lowered`.
    """
    with _abstract_gpu():
        return jax.jit(function, donate_argnums=tuple(donated)).trace(*arguments).lower(lowering_platforms=("cuda",))


def triton_kernels(lowered: Any) -> list[TritonKernel]:
    """The Triton kernels of a lowered computation, in order of appearance.

    Args:
        lowered: A `jax.stages.Lowered`.
    """
    found: list[TritonKernel] = []
    _walk(lowered.compiler_ir().operation, found)
    return found


def _walk(operation: Any, found: list[TritonKernel]) -> None:
    for region in operation.regions:
        for block in region.blocks:
            for child in block.operations:
                if child.operation.name == "stablehlo.custom_call" and "triton" in str(
                    child.attributes["call_target_name"]
                ):
                    found.append(_read(child.attributes["mhlo.backend_config"]))
                _walk(child.operation, found)


def _read(config: Any) -> TritonKernel:
    def integer(name: str) -> int:
        return ir.IntegerAttr(config[name]).value

    grid = integer("grid_x"), integer("grid_y"), integer("grid_z")
    text = _text(ir.StringAttr(config["ir"]).value_bytes)
    return TritonKernel(ir.StringAttr(config["name"]).value, text, grid, integer("num_warps"), integer("num_stages"))


def _text(bytecode: bytes) -> str:
    with ir.Context() as context:
        _triton.dialect.register_dialect(context)  # pyright: ignore[reportPrivateImportUsage]
        context.load_all_available_dialects()
        context.allow_unregistered_dialects = True
        return str(ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=False))
