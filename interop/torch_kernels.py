"""Pallas Triton kernels launched by torch: on torch tensors, on torch's current stream, no JAX runtime on the GPU.

A JAX function that does nothing but launch kernels is lowered (which needs no GPU), its Triton IR compiled by the
`triton` package, and its launches repeated with the addresses of torch tensors. Nothing waits and nothing is read back,
so a CUDA graph can capture it; what the function makes on the way lies in one workspace from torch's allocator.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from interop.split import split_constants
from pallas_kernels._compat import TritonKernel, lower_for_cuda, triton_kernels

ALIGNMENT = 256
"""Bytes that parts of the workspace are aligned to."""

POINTER_ALIGNMENT = 16
"""Bytes that the kernels assume arrays are aligned to."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array is: the index-th input, constant or output, or an offset into the workspace.

    Attributes:
        kind: "input", "constant", "output" or "workspace".
        index: Which, or the offset in bytes.
    """

    kind: str
    index: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel and where its arguments are: operands, then results."""

    kernel: TritonKernel
    arguments: tuple[Place, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A lowered function as launches.

    Attributes:
        inputs: Shape and type of each input, flat.
        launches: In order.
        outputs: Where each result is.
        made: Shape and type of each new output.
        constants: Values of constants.
        workspace: Bytes of the workspace.
    """

    inputs: tuple[tuple[tuple[int, ...], str], ...]
    launches: tuple[Launch, ...]
    outputs: tuple[Place, ...]
    made: tuple[tuple[tuple[int, ...], str], ...]
    constants: tuple[np.ndarray, ...]
    workspace: int


def plan_launches(function: Callable, *shapes: Any) -> Plan:
    """Lowers a function of arrays that, but for what it makes of constants, only launches kernels.

    Args:
        function: The function; anything static is bound already.
        *shapes: Pytrees of `jax.ShapeDtypeStruct`.

    Raises:
        NotImplementedError: If it computes anything else outside of kernels.
    """
    split, leaves = split_constants(function, *shapes), jax.tree.leaves(shapes)
    values = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in split.values]
    inputs = [*values, *(leaves[i] for i in split.used)]
    lowered = lower_for_cuda(split.function, inputs)
    reader = _Reader(triton_kernels(lowered), lowered.compiler_ir())
    places = [Place("constant", i) for i in range(len(values))] + [Place("input", i) for i in split.used]
    reader.constants += split.values
    return reader.read(tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves), places)


class _Reader:
    """Reads launches off a lowered module, calls between its functions followed."""

    def __init__(self, kernels: list[TritonKernel], module: Any) -> None:
        self.functions = {op.attributes["sym_name"].value: op for op in module.body.operations}
        calls = [op for function in self.functions.values() for op in function.regions[0].blocks[0].operations]
        launches = [op for op in calls if _is_kernel(op)]
        if len(launches) != len(kernels):
            raise NotImplementedError(f"expected kernels outside of loops and branches, got {len(kernels)} inside some")
        self.kernels = dict(zip(map(hash, launches), kernels, strict=True))
        self.launches: list[Launch] = []
        self.constants: list[np.ndarray] = []
        self.made: list[tuple[tuple[int, ...], str]] = []
        self.workspace = 0

    def read(self, inputs: tuple[tuple[tuple[int, ...], str], ...], places: list[Place]) -> Plan:
        block = self.functions["main"].regions[0].blocks[0]
        results = {hash(value) for value in list(block.operations)[-1].operands}
        outputs = tuple(self._run("main", places, results))
        made, constants = tuple(self.made), tuple(self.constants)
        return Plan(inputs, tuple(self.launches), outputs, made, constants, self.workspace)

    def _run(self, name: str, arguments: list[Place], outputs: set[int]) -> list[Place]:
        """Reads a function; results among `outputs` become outputs of the plan."""
        block = self.functions[name].regions[0].blocks[0]
        known = dict(zip(map(hash, block.arguments), arguments, strict=True))
        for op in block.operations:
            operands = [known[hash(value)] for value in op.operands]
            kind = op.operation.name
            if kind in ("func.return", "stablehlo.return"):
                return operands
            if kind == "func.call":
                inner = self.functions[op.attributes["callee"].value].regions[0].blocks[0]
                ends = list(inner.operations)[-1].operands
                wanted = {hash(e) for e, result in zip(ends, op.results, strict=True) if hash(result) in outputs}
                found = self._run(op.attributes["callee"].value, operands, wanted)
            elif kind == "stablehlo.constant":
                self.constants.append(np.array(op.attributes["value"]).reshape(_shape(op.results[0])))
                found = [Place("constant", len(self.constants) - 1)]
            elif kind == "stablehlo.reshape":
                found = operands
            elif _is_kernel(op):
                found = self._launch(op, operands, outputs)
            else:
                raise NotImplementedError(f"expected a function that only launches kernels, got {kind}")
            known.update(zip(map(hash, op.results), found, strict=True))
        raise AssertionError("a function without a return")

    def _launch(self, op: Any, operands: list[Place], outputs: set[int]) -> list[Place]:
        shared = _aliases(op)
        results = []
        for i, value in enumerate(op.results):
            shape, dtype = _shape(value), _dtype(value)
            if i in shared:
                results.append(operands[shared[i]])
            elif hash(value) in outputs:
                self.made.append((shape, dtype))
                results.append(Place("output", len(self.made) - 1))
            else:
                results.append(Place("workspace", self.workspace))
                size = int(np.prod(shape)) * getattr(torch, dtype).itemsize
                self.workspace += -(-size // ALIGNMENT) * ALIGNMENT
        self.launches.append(Launch(self.kernels[hash(op)], (*operands, *results)))
        return results


def _is_kernel(op: Any) -> bool:
    return op.operation.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"])


def _aliases(op: Any) -> dict[int, int]:
    """Operand that each result shares its memory with."""
    if "output_operand_aliases" not in op.attributes:
        return {}
    aliases = [str(alias) for alias in op.attributes["output_operand_aliases"]]
    return dict(_alias(text, len(op.results)) for text in aliases)


def _alias(text: str, results: int) -> tuple[int, int]:
    """Result and operand of `#stablehlo.output_operand_alias<output_tuple_indices = [0], operand_index = 2, ...>`."""
    result = text.split("output_tuple_indices = [")[1].split("]")[0]
    operand = int(text.split("operand_index = ")[1].split(",")[0].rstrip(">"))
    return (int(result) if result else 0), operand


_TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "i1": "bool"} | {
    f"{letter}i{bits}": f"{word}int{bits}" for letter, word in (("", ""), ("u", "u"), ("s", "")) for bits in (8, 16, 32)
}


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.type.shape)


def _dtype(value: Any) -> str:
    return _TYPES[str(value.type.element_type)]


@functools.cache
def compile_kernel(kernel: TritonKernel) -> Any:
    """A kernel compiled for the current GPU by the `triton` package; once for each kernel.

    Raises:
        ImportError: Without `triton`.
    """
    import triton
    from triton.runtime import driver

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ttir"
        source.write_text(kernel.ir)
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
        return triton.compile(str(source), target=driver.active.get_current_target(), options=options)


class TorchProgram:
    """A JAX function of kernels as a function of torch tensors; see the module.

    Attributes:
        plan: Its launches.

    Args:
        function: As for `plan_launches`.
        *examples: Pytrees of tensors (meta ones will do), whose shapes and types are those of every call.
        device: The GPU.
    """

    def __init__(self, function: Callable, *examples: Any, device: torch.device) -> None:
        self.device = device
        self.plan = plan_launches(function, *jax.tree.map(_struct, examples))
        self._constants = [constant(value, self.device) for value in self.plan.constants]
        self._made = [(shape, getattr(torch, dtype)) for shape, dtype in self.plan.made]
        with torch.cuda.device(self.device):
            self._kernels = [compile_kernel(launch.kernel) for launch in self.plan.launches]
            self._runs = [kernel.run for kernel in self._kernels]  # loads the modules, which no capture may do

    def __call__(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Launches on the current stream.

        Args:
            *arguments: Trees as the examples.

        Returns:
            The results, flat; a result that the function updates in place is the tensor that was given.
        """
        return self.launch(jax.tree.leaves(arguments))

    def check(self, tensors: list[torch.Tensor]) -> list[int]:
        """Addresses of the inputs, or raises ValueError for tensors unlike the examples."""
        for tensor, (shape, dtype) in zip(tensors, self.plan.inputs, strict=True):
            if tuple(tensor.shape) != shape or _numpy_name(tensor) != dtype or tensor.device != self.device:
                raise ValueError(
                    f"expected {dtype}{list(shape)} on {self.device}, "
                    f"got {_numpy_name(tensor)}{list(tensor.shape)} on {tensor.device}"
                )
            if not tensor.is_contiguous() or tensor.data_ptr() % POINTER_ALIGNMENT:
                raise ValueError(
                    f"expected contiguous memory aligned to {POINTER_ALIGNMENT} bytes, "
                    f"got strides {tensor.stride()} at offset {tensor.data_ptr() % POINTER_ALIGNMENT}"
                )
        return [tensor.data_ptr() for tensor in tensors]

    def launch(self, tensors: list[torch.Tensor], pointers: list[int] | None = None) -> tuple[torch.Tensor, ...]:
        """Launches on flat inputs; `pointers`, as `check` gave them, spare the checks."""
        pointers = self.check(tensors) if pointers is None else pointers
        made = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self._made]
        workspace = torch.empty(self.plan.workspace, dtype=torch.uint8, device=self.device)
        start = workspace.data_ptr()
        # torch's raw stream of this device, as triton's own launcher takes it
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        for launch, kernel, run in zip(self.plan.launches, self._kernels, self._runs, strict=True):
            addresses = []
            for place in launch.arguments:
                if place.kind == "input":
                    addresses.append(pointers[place.index])
                elif place.kind == "workspace":
                    addresses.append(start + place.index)
                else:
                    held = self._constants if place.kind == "constant" else made
                    addresses.append(held[place.index].data_ptr())
            run(*launch.kernel.grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *addresses)
        held = {"input": tensors, "output": made, "constant": self._constants}
        return tuple(held[place.kind][place.index] for place in self.plan.outputs)


def constant(value: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of an array's values; bfloat16, which numpy does not know, by its bits."""
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.uint16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(value.copy()).to(device)


def _struct(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(tensor.shape), _numpy_name(tensor))


def _numpy_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
