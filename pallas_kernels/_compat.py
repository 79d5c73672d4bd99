"""Every switch between JAX versions and every private import, in one place.

Pallas kernels lower to a custom call that carries Triton IR, and lowering needs no GPU. From jax 0.11 the compute
capability must be named by an abstract device; before, the lowering assumes Hopper.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend
from jax._src.lib import triton as _triton  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.pallas.triton import lowering as triton_lowering
from jax._src.pallas.triton import primitives as triton_primitives

ABSTRACT_DEVICE_KIND = "NVIDIA H100 80GB HBM3"
"""A device kind that JAX knows; the Triton IR of these kernels is the same for all of them."""


H100_MULTIPROCESSORS = 132


def multiprocessors() -> int:
    """Of JAX's GPU; of an H100 where there is none."""
    if jax.default_backend() != "gpu":
        return H100_MULTIPROCESSORS
    return int(getattr(jax.devices()[0], "core_count", H100_MULTIPROCESSORS))


@dataclasses.dataclass(frozen=True)
class TritonKernel:
    """A lowered Pallas kernel before compilation.

    Attributes:
        name: Name of the entry.
        ir: Triton IR as text.
        grid: Programs along x, y and z.
        num_warps: Warps a program.
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
    if jax.__version_info__ < (0, 11) or jax.default_backend() == "gpu":
        yield
        return
    device = sharding.AbstractDevice(device_kind=ABSTRACT_DEVICE_KIND, num_cores=H100_MULTIPROCESSORS, platform="gpu")
    mesh = sharding.AbstractMesh((1,), ("gpu",), (sharding.AxisType.Auto,), abstract_device=device)
    with sharding.use_abstract_mesh(mesh):
        yield


def compute_capability() -> int:
    """Compute capability of the GPU, times ten; that of Hopper where there is none."""
    if jax.default_backend() != "gpu":
        return 90
    major, minor = str(jax.devices()[0].compute_capability).split(".")
    return 10 * int(major) + int(minor)


def lower_for_cuda(function: Callable, *arguments: Any, donated: Sequence[int] = ()) -> Any:
    """Lowers a function of arrays (or of their `jax.ShapeDtypeStruct`) for NVIDIA GPUs, with or without one.

    Args:
        function: Function to trace; anything static is bound already.
        *arguments: Pytrees of arrays or shapes.
        donated: Numbers of the arguments that results may overwrite.

    Returns:
        The `jax.stages.Lowered`.
    """
    with _abstract_gpu():
        return jax.jit(function, donate_argnums=tuple(donated)).trace(*arguments).lower(lowering_platforms=("cuda",))


def triton_kernels(lowered: Any) -> list[TritonKernel]:
    """The Triton kernels of a lowered computation, in order of appearance."""
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


_narrow_offsets = triton_lowering._compute_offsets_from_indices


def _compute_offsets(block_info: Any, indexer: Any) -> Any:
    """Pallas's offsets of a tile's elements, of 64 bits from 2**31 elements on.

    Up to jax 0.12 it takes 32 bits for arrays of up to 2**32 bytes, and Triton has them signed.
    """
    whole = block_info.full_shape_dtype
    if math.prod(whole.shape) > 2**31:
        # The first axis has no part in strides, so that an array that is longer is addressed alike.
        longer = jax.ShapeDtypeStruct((2**33, *whole.shape[1:]), whole.dtype)
        block_info = dataclasses.replace(block_info, full_shape_dtype=longer)
    return _narrow_offsets(block_info, indexer)


triton_lowering._compute_offsets_from_indices = _compute_offsets


_assembly_p = jax.extend.core.Primitive("assembly")
_assembly_p.multiple_results = True


@_assembly_p.def_abstract_eval
def _assembly_types(*x: Any, result_types: tuple[Any, ...], **_: Any) -> list[Any]:
    return [x[0].update(dtype=dtype) for dtype in result_types]


@triton_lowering.register_lowering(_assembly_p)
def _lower_assembly(context: Any, *x: Any, result_types: tuple[Any, ...], **options: Any) -> list[Any]:
    lower: Any = triton_primitives._elementwise_inline_asm_lowering  # pyright: ignore[reportAttributeAccessIssue]
    [results] = lower(context, *x, result_shape_dtypes=result_types, **options)
    return list(results) if len(result_types) > 1 else [results]


def elementwise_assembly(
    text: str, constraints: str, x: Sequence[jax.Array], result_types: Sequence[Any]
) -> list[jax.Array]:
    """Pallas Triton's `elementwise_inline_asm`, which up to jax 0.11 lowers one result only, with several.

    Args:
        text: Instructions.
        constraints: Of results and arguments, as LLVM has them.
        x: Arguments, tiles of one shape.
        result_types: Types of the results.
    """
    types = tuple(jax.numpy.dtype(kind) for kind in result_types)
    return _assembly_p.bind(*x, asm=text, constraints=constraints, pack=1, result_types=types)


def gpu_kernel_times(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Name and milliseconds of each GPU kernel of the process, JAX's or not, in order of launch.

    Args:
        run: Launches them and waits for them.
    """
    from jax._src.lib import mosaic_gpu

    cupti: Any = mosaic_gpu._mosaic_gpu_ext  # pyright: ignore[reportPrivateImportUsage]
    cupti._cupti_init()
    try:
        run()
    finally:
        timings = cupti._cupti_get_timings(True)
    return list(timings or ())
