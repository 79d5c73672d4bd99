"""Pallas Triton kernels launched by torch: on torch tensors, on torch's current stream, no JAX runtime on the GPU.

A JAX function that does nothing but launch kernels is lowered (which needs no GPU), its Triton IR compiled by the
`triton` package, and its launches repeated with the addresses of torch tensors. Nothing waits and nothing is read back,
so a CUDA graph can capture it; what the function makes on the way lies in one workspace from torch's allocator.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from interop.launcher.constants import split_constants
from pallas_kernels.compat.lowering import TritonKernel, lower_for_cuda, triton_kernels

ALIGNMENT = 256
"""Bytes that parts of the workspace are aligned to."""

STREAM = 3
"""Place of the stream among the arguments of a launch, after the grid."""

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


def require_alike(
    tensors: list[torch.Tensor], inputs: tuple[tuple[tuple[int, ...], str], ...], device: torch.device
) -> None:
    """Raises ValueError for tensors of other shapes or types, not contiguous, or off alignment."""
    for tensor, (shape, dtype) in zip(tensors, inputs, strict=True):
        if tuple(tensor.shape) != shape or _numpy_name(tensor) != dtype or tensor.device != device:
            raise ValueError(
                f"expected {dtype}{list(shape)} on {device}, "
                f"got {_numpy_name(tensor)}{list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous() or tensor.data_ptr() % POINTER_ALIGNMENT:
            raise ValueError(
                f"expected contiguous memory aligned to {POINTER_ALIGNMENT} bytes, "
                f"got strides {tensor.stride()} at offset {tensor.data_ptr() % POINTER_ALIGNMENT}"
            )


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
        self.plan = plan_launches(function, *jax.tree.map(struct, examples))
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

    def check(self, tensors: list[torch.Tensor]) -> None:
        """Raises ValueError for tensors unlike the examples."""
        require_alike(tensors, self.plan.inputs, self.device)

    def launch(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Launches on flat inputs, which are checked."""
        self.check(tensors)
        return self._run(self._calls(()), (), tensors)

    def bind(self, fixed: Sequence[torch.Tensor]) -> Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]]:
        """The program with its first inputs given, as a function of the others; neither are checked."""
        return functools.partial(self._run, self._calls(fixed), tuple(fixed))

    def _calls(self, fixed: Sequence[torch.Tensor]) -> list[tuple[Callable, list[Any], list[tuple[int, int, int]]]]:
        """What to call for each launch, with which arguments, and which of these are known only then.

        The latter are places in the arguments, places in the addresses that a run has, and offsets.
        """
        known = {("input", i): tensor for i, tensor in enumerate(fixed)}
        known |= {("constant", i): tensor for i, tensor in enumerate(self._constants)}
        first = {"workspace": 0, "output": 1, "input": 1 + len(self._made) - len(fixed)}
        calls = []
        for launch, kernel, run in zip(self.plan.launches, self._kernels, self._runs, strict=True):
            arguments = [*launch.kernel.grid, None, kernel.function, kernel.packed_metadata, None, None, None]
            later = []
            for place in launch.arguments:
                held = known.get((place.kind, place.index))
                if place.kind == "workspace":
                    later.append((len(arguments), 0, place.index))
                elif held is None:
                    later.append((len(arguments), first[place.kind] + place.index, 0))
                arguments.append(None if held is None else held.data_ptr())
            calls.append((run, arguments, later))
        return calls

    def _run(
        self, calls: list[Any], fixed: tuple[torch.Tensor, ...], given: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        made = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self._made]
        workspace = torch.empty(self.plan.workspace, dtype=torch.uint8, device=self.device)
        addresses = [workspace.data_ptr(), *(x.data_ptr() for x in made), *(x.data_ptr() for x in given)]
        # torch's raw stream of this device, as triton's own launcher takes it
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        for run, template, later in calls:
            arguments = template.copy()
            arguments[STREAM] = stream
            for place, index, offset in later:
                arguments[place] = addresses[index] + offset
            run(*arguments)
        held = {"input": (*fixed, *given), "output": made, "constant": self._constants}
        return tuple(held[place.kind][place.index] for place in self.plan.outputs)


class BoundProgram:
    """A JAX function of kernels whose first argument is a tree of tensors that stay where they are.

    It is lowered once for each set of shapes, by all that have equal functions and trees of equal shapes together.

    Args:
        function: As for `TorchProgram`, and hashable: equal ones compute the same.
        fixed: The tree.
        kind: `TorchProgram`, or another class like it.
    """

    def __init__(self, function: Callable, fixed: Any, *, kind: Any = None) -> None:
        self._function, self._kind = function, kind or TorchProgram
        self._fixed, self._structure = jax.tree.flatten(fixed)
        self._programs: dict[Any, Callable] = {}

    def __call__(self, *arguments: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Launches with further arguments, each contiguous; results as of `TorchProgram`."""
        given = [x if x.data_ptr() % POINTER_ALIGNMENT == 0 else x.clone() for x in arguments if x is not None]
        key = tuple(None if x is None else (x.shape, x.dtype) for x in arguments)
        if key not in self._programs:
            self._programs[key] = self._make(key, given)
        return self._programs[key](given)

    def _make(self, key: tuple[Any, ...], given: list[torch.Tensor]) -> Callable:
        fixed = tuple((x.shape, x.dtype) for x in self._fixed)
        program = _shared_program(self._kind, self._function, fixed, self._structure, key, self._fixed[0].device)
        program.check([*self._fixed, *given])
        return program.bind(self._fixed)


@functools.lru_cache(maxsize=256)
def _shared_program(
    kind: Any, function: Callable, fixed: tuple[Any, ...], structure: Any, key: tuple[Any, ...], device: torch.device
) -> Any:
    def meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tree = jax.tree.unflatten(structure, [meta(*leaf) for leaf in fixed])
    return kind(function, tree, *(None if x is None else meta(*x) for x in key), device=device)


def constant(value: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of an array's values; bfloat16, which numpy does not know, by its bits."""
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.uint16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(value.copy()).to(device)


def struct(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    """Shape and type of a tensor, as JAX has them."""
    return jax.ShapeDtypeStruct(tuple(tensor.shape), _numpy_name(tensor))


def _numpy_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
