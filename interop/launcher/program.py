"""Pallas Triton kernels launched by torch: on torch tensors, on torch's current stream, no JAX runtime on the GPU.

A JAX function that does nothing but launch kernels is lowered, which needs no GPU. The `triton` package compiles its
Triton IR, and each call repeats the launches with the addresses of torch tensors. Nothing waits and nothing is read
back, so a CUDA graph can capture a call. Intermediate arrays lie in one workspace from torch's allocator.
"""

import concurrent.futures
import dataclasses
import functools
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import torch

from interop.launcher.launches import Launch, ShapeAndType, plan_launches
from pallas_kernels.compat.lowering import TritonKernel

STREAM = 3
"""Index of the stream among the arguments of a launch; the three sizes of the grid come first."""

POINTER_ALIGNMENT = 16
"""Alignment of arrays that the kernels assume, in bytes."""

_DRIVER = threading.Lock()
"""Held while `triton` finds out about the GPU, which it does at its first use."""


def compile_kernel(kernel: TritonKernel) -> Any:
    """A kernel compiled for the current GPU by the `triton` package.

    Kernels that differ only in their grids are compiled once, and `triton` keeps what it compiled on disk.

    Raises:
        ImportError: If `triton` is not installed.
    """
    return _compiled(kernel.ir, kernel.num_warps, kernel.num_stages)


@functools.cache
def _compiled(ir: str, num_warps: int, num_stages: int) -> Any:
    import triton
    from triton.runtime import driver

    with _DRIVER:
        target = driver.active.get_current_target()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ttir"
        source.write_text(ir)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        return triton.compile(str(source), target=target, options=options)


@functools.cache
def _threads() -> concurrent.futures.Executor:
    """The threads that compile."""
    return concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")


@dataclasses.dataclass(frozen=True)
class FirstPart:
    """The first part of an array along its first axis; kernels neither read nor write the rest, which need not exist.

    Attributes:
        tensor: The part.
        size: Length of the first axis of the whole array.
    """

    tensor: torch.Tensor
    size: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole array."""
        return torch.Size((self.size, *self.tensor.shape[1:]))


@dataclasses.dataclass(frozen=True)
class StridedRows:
    """An array of rows of which only the beginnings count, as pages in the blocks of a serving engine.

    To a kernel it is an array [rows, stride] without gaps. The kernel touches the beginning of each row alone: the rest
    is memory of others, and behind the last row there need be none.

    Attributes:
        tensor: [rows, ...], the beginnings, each without gaps.
        sizes: Shape that the whole array is taken for; by default [rows, stride].
    """

    tensor: torch.Tensor
    sizes: tuple[int, ...] | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole array."""
        return torch.Size(self.sizes or (self.tensor.shape[0], self.tensor.stride(0)))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self.tensor.device

    def data_ptr(self) -> int:
        """Address of the first row."""
        return self.tensor.data_ptr()

    def reshape(self, sizes: Sequence[int]) -> "StridedRows":
        """The same memory in another shape."""
        return StridedRows(self.tensor, tuple(sizes))

    def contiguous(self) -> "StridedRows":
        """The array itself."""
        return self


Addressed = torch.Tensor | StridedRows
"""Memory with an address."""

Argument = Addressed | FirstPart
"""What kernels take as an array."""


def require_alike(tensors: Sequence[Argument], inputs: Sequence[ShapeAndType], device: torch.device) -> None:
    """Raises ValueError for tensors of other shapes, types or devices, with gaps, or not aligned."""
    for given, (shape, dtype) in zip(tensors, inputs, strict=True):
        tensor = given if isinstance(given, torch.Tensor) else given.tensor
        tensor = tensor[:1] if isinstance(given, StridedRows) else tensor
        if tuple(given.shape) != shape or _numpy_name(tensor) != dtype or tensor.device != device:
            raise ValueError(
                f"expected {dtype}{list(shape)} on {device}, "
                f"got {_numpy_name(tensor)}{list(given.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous() or tensor.data_ptr() % POINTER_ALIGNMENT:
            raise ValueError(
                f"expected contiguous memory aligned to {POINTER_ALIGNMENT} bytes, "
                f"got strides {tensor.stride()} at offset {tensor.data_ptr() % POINTER_ALIGNMENT}"
            )


class TorchProgram:
    """A JAX function that only launches kernels, as a function of torch tensors of fixed shapes.

    Making it lowers the function and starts to compile its kernels; the first use waits for them and loads them, and
    every later call only launches them.

    Attributes:
        plan: The launches.

    Args:
        function: The function, as for `plan_launches`.
        *examples: Its arguments, as pytrees of tensors with the shapes and types of every call; meta tensors will do.
        device: The GPU that it runs on.

    Raises:
        NotImplementedError: If the function computes anything outside of kernels (`TorchFunction` takes some of these).
        ImportError: If `triton` is not installed.
    """

    def __init__(self, function: Callable, *examples: Any, device: torch.device) -> None:
        self.device = device
        self.plan = plan_launches(function, *jax.tree.map(struct, examples))
        self._constants = [constant(value, self.device) for value in self.plan.constants]
        self._made = [(shape, getattr(torch, dtype)) for shape, dtype in self.plan.made]
        self._outputs = [(place.kind, place.index) for place in self.plan.outputs]
        # Most of compiling lets other threads run.
        self._compiling = [_threads().submit(self._compile, launch) for launch in self.plan.launches]

    @functools.cached_property
    def _kernels(self) -> list[Any]:
        kernels = [compiling.result() for compiling in self._compiling]
        with torch.cuda.device(self.device):
            for kernel in kernels:
                _ = kernel.run  # loads the module, which no capture may do
        return kernels

    def _compile(self, launch: Launch) -> Any:
        with torch.cuda.device(self.device):
            return compile_kernel(launch.kernel)

    def __call__(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Launches the kernels on the current stream.

        Args:
            *arguments: Pytrees of tensors like the examples.

        Returns:
            The results, flat. If the function updates an argument in place, the result is the tensor that was given.
        """
        return self.launch(jax.tree.leaves(arguments))

    def check(self, tensors: Sequence[Argument]) -> None:
        """Raises ValueError for flat inputs unlike the examples."""
        require_alike(tensors, self.plan.inputs, self.device)

    def launch(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Checks flat inputs and launches the kernels on them."""
        self.check(tensors)
        return self._run(self._calls(()), (), tensors)

    def bind(self, fixed: Sequence[Argument]) -> "Bound":
        """The program with its first flat inputs bound, as a function of the others; nothing is checked."""
        return functools.partial(self._run, self._calls(fixed), tuple(fixed))

    def _calls(self, fixed: Sequence[Argument]) -> list[tuple[Callable, list[Any], list[tuple[int, int, int]]]]:
        """Prepares the launches, with the addresses that are known before a run filled in.

        Args:
            fixed: The first flat inputs.

        Returns:
            Per launch: the function to call; its arguments, None where unknown; and for each unknown address its index
            among the arguments, its index among the addresses that `_run` lists, and an offset in bytes.
        """
        known: dict[Any, Any] = {("input", i): tensor for i, tensor in enumerate(fixed)}
        known |= {("constant", i): tensor for i, tensor in enumerate(self._constants)}
        first = {"workspace": 0, "output": 1, "input": 1 + len(self._made) - len(fixed)}
        calls = []
        for launch, kernel in zip(self.plan.launches, self._kernels, strict=True):
            arguments = [*launch.kernel.grid, None, kernel.function, kernel.packed_metadata, None, None, None]
            later = []
            for place in launch.arguments:
                held = known.get((place.kind, place.index))
                if place.kind == "workspace":
                    later.append((len(arguments), 0, place.index))
                elif held is None:
                    later.append((len(arguments), first[place.kind] + place.index, 0))
                arguments.append(None if held is None else held.data_ptr())
            calls.append((kernel.run, arguments, later))
        return calls

    def _run(
        self,
        calls: list[Any],
        fixed: tuple[Argument, ...],
        given: Sequence[Addressed],
        out: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, ...]:
        require_alike(out, self.plan.made[: len(out)], self.device)
        made = [*out, *(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self._made[len(out) :])]
        workspace = None
        if self.plan.workspace:
            workspace = torch.empty(self.plan.workspace, dtype=torch.uint8, device=self.device)
        addresses = [
            0 if workspace is None else workspace.data_ptr(),
            *(x.data_ptr() for x in made),
            *(x.data_ptr() for x in given),
        ]
        # triton's own launcher takes the stream of a device from the same function
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        for run, template, later in calls:
            arguments = template.copy()
            arguments[STREAM] = stream
            for place, index, offset in later:
                arguments[place] = addresses[index] + offset
            run(*arguments)
        held = {"input": (*fixed, *given), "output": made, "constant": self._constants}
        return tuple([held[kind][index] for kind, index in self._outputs])


class Bound(Protocol):
    """A function of flat inputs; tensors in `out` take the place of its first results that are not updated inputs."""

    def __call__(self, given: Sequence[Addressed], *, out: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, ...]:
        """The results, as those of `TorchProgram`."""
        ...


class Program(Protocol):
    """The methods that `BoundProgram` calls on the class that runs a function: `TorchProgram` or `TorchFunction`."""

    def __init__(self, function: Callable, *examples: Any, device: torch.device) -> None: ...

    def check(self, tensors: Sequence[Argument]) -> None:
        """Raises ValueError for flat inputs unlike the examples."""
        ...

    def bind(self, fixed: Sequence[Argument]) -> Bound:
        """The function with its first flat inputs bound, as a function of the others."""
        ...


class BoundProgram:
    """A JAX function of kernels whose first argument is a pytree of tensors that stay where they are, like a cache.

    The function is lowered at the first call with new shapes. Bound programs with equal functions and pytrees of equal
    shapes, like the layers of a model, share the lowered and compiled program.

    Args:
        function: The function, as for `kind`. It is hashable, and equal functions compute the same.
        fixed: The first argument of every call.
        kind: Class that runs the function: `TorchProgram` (the default) if it only launches kernels, `TorchFunction`
            (`interop.launcher.function`) if it has simple operations between them.
    """

    def __init__(self, function: Callable, fixed: Any, *, kind: type[Program] | None = None) -> None:
        self._function, self._kind = function, kind or TorchProgram
        self._fixed, self._structure = jax.tree.flatten(fixed)
        self._programs: dict[Any, Bound] = {}

    def __call__(self, *arguments: Argument | None, out: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, ...]:
        """Launches the kernels with the remaining arguments.

        Args:
            *arguments: Contiguous tensors, first parts of them or rows if the function only launches kernels, or None
                for an argument that the function does not get.
            out: Contiguous tensors that take the place of the first results that are not updated in place.

        Returns:
            The results, as those of `TorchProgram`.
        """
        given = [_aligned(x) for x in arguments if x is not None]
        return self._bound(arguments, given)([x.tensor if isinstance(x, FirstPart) else x for x in given], out=out)

    def bound(self, *arguments: Argument | None) -> "Bound":
        """The function of arguments of the shapes and types of these, as a function of their tensors without None.

        It is for callers that call it very often: it takes the tensors at their addresses, which must be aligned to
        `POINTER_ALIGNMENT` bytes, and checks nothing.
        """
        return self._bound(arguments, [x for x in arguments if x is not None])

    def _bound(self, arguments: Sequence[Any], given: Sequence[Argument]) -> "Bound":
        held = iter(given)
        key = tuple(None if x is None else (x.shape, _dtype(next(held))) for x in arguments)
        if key not in self._programs:
            self._programs[key] = self._make(key, given)
        return self._programs[key]

    def prepare(self, *shapes: Argument | None) -> None:
        """Lowers the function for arguments of such shapes and starts to compile it; their first call waits less.

        Args:
            *shapes: The remaining arguments; meta tensors will do.
        """
        self._program(tuple(None if x is None else (x.shape, _dtype(x)) for x in shapes))

    def _program(self, key: tuple[Any, ...]) -> Program:
        fixed = tuple((x.shape, x.dtype) for x in self._fixed)
        return _shared_program(self._kind, self._function, fixed, self._structure, key, self._fixed[0].device)

    def _make(self, key: tuple[Any, ...], given: Sequence[Argument]) -> Bound:
        program = self._program(key)
        program.check([*self._fixed, *given])
        return program.bind(self._fixed)


def _dtype(x: Argument) -> torch.dtype:
    return x.tensor.dtype if isinstance(x, FirstPart) else x.dtype


def _aligned(x: Argument) -> Argument:
    """The argument, or a copy at an address that kernels assume; of rows, whoever makes them sees to that."""
    if isinstance(x, StridedRows):
        return x
    if isinstance(x, FirstPart):
        return x if x.tensor.data_ptr() % POINTER_ALIGNMENT == 0 else FirstPart(x.tensor.clone(), x.size)
    return x if x.data_ptr() % POINTER_ALIGNMENT == 0 else x.clone()


@functools.lru_cache(maxsize=256)
def _shared_program(
    kind: type[Program],
    function: Callable,
    fixed: tuple[Any, ...],
    structure: Any,
    key: tuple[Any, ...],
    device: torch.device,
) -> Program:
    def meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tree = jax.tree.unflatten(structure, [meta(*leaf) for leaf in fixed])
    return kind(function, tree, *(None if x is None else meta(*x) for x in key), device=device)


def constant(value: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of an array's values; bfloat16, which torch does not take from NumPy, goes by its bits."""
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.uint16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(value.copy()).to(device)


def struct(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    """Shape and type of a tensor, for JAX."""
    return jax.ShapeDtypeStruct(tuple(tensor.shape), _numpy_name(tensor))


def _numpy_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
