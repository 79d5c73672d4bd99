"""Launches of Pallas Triton kernels, read from a lowered JAX function: which kernels, on which arrays, in which order.

Nothing here needs a GPU or compiles a kernel; `interop.launcher.program` does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from interop.launcher.constants import split_constants
from pallas_kernels.compat.lowering import TritonKernel, lower_for_cuda, triton_kernels

ALIGNMENT = 256
"""Alignment of each array in the workspace, in bytes."""

ShapeAndType = tuple[tuple[int, ...], str]
"""Shape of an array and the name of its type, like "bfloat16"."""


@dataclasses.dataclass(frozen=True)
class ArrayPlace:
    """Where an argument of a launch lies.

    Attributes:
        kind: "input" (given by the caller), "constant" (computed when the function is lowered), "output" (allocated per
            call and returned) or "workspace" (allocated per call and dropped).
        index: Index among the inputs, constants or outputs; in the workspace, the offset in bytes.
    """

    kind: str
    index: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: The kernel.
        arguments: Where its arguments lie: operands, then results.
    """

    kernel: TritonKernel
    arguments: tuple[ArrayPlace, ...]


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """A lowered function as a sequence of launches.

    Attributes:
        inputs: Each input of the function, flat.
        launches: The launches, in order.
        outputs: Where each result of the function lies; a result that is updated in place lies in an input.
        made: Each output that a call allocates.
        constants: Values of the constants.
        workspace: Size of the workspace in bytes.
    """

    inputs: tuple[ShapeAndType, ...]
    launches: tuple[Launch, ...]
    outputs: tuple[ArrayPlace, ...]
    made: tuple[ShapeAndType, ...]
    constants: tuple[np.ndarray, ...]
    workspace: int


def plan_launches(function: Callable, *shapes: Any) -> LaunchPlan:
    """Lowers a function of arrays that only launches kernels; operations on constants alone are run now.

    Args:
        function: The function, with everything static bound.
        *shapes: Its arguments, as pytrees of `jax.ShapeDtypeStruct`.

    Returns:
        The launches.

    Raises:
        NotImplementedError: If the function computes anything else outside of kernels.
    """
    split, leaves = split_constants(function, *shapes), jax.tree.leaves(shapes)
    values = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in split.values]
    inputs = [*values, *(leaves[i] for i in split.used)]
    lowered = lower_for_cuda(split.function, inputs)
    reader = _Reader(triton_kernels(lowered), lowered.compiler_ir())
    places = [ArrayPlace("constant", i) for i in range(len(values))] + [ArrayPlace("input", i) for i in split.used]
    reader.constants += split.values
    return reader.read(tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves), places)


class _Reader:
    """Reads the launches of a lowered module; calls between the functions of the module are followed."""

    def __init__(self, kernels: list[TritonKernel], module: Any) -> None:
        self.functions = {op.attributes["sym_name"].value: op for op in module.body.operations}
        calls = [op for function in self.functions.values() for op in function.regions[0].blocks[0].operations]
        launches = [op for op in calls if _is_kernel(op)]
        if len(launches) != len(kernels):
            raise NotImplementedError(f"expected kernels outside of loops and branches, got {len(kernels)} inside some")
        self.kernels = dict(zip(map(hash, launches), kernels, strict=True))
        self.launches: list[Launch] = []
        self.constants: list[np.ndarray] = []
        self.made: list[ShapeAndType] = []
        self.workspace = 0

    def read(self, inputs: tuple[ShapeAndType, ...], places: list[ArrayPlace]) -> LaunchPlan:
        block = self.functions["main"].regions[0].blocks[0]
        results = {hash(value) for value in list(block.operations)[-1].operands}
        outputs = tuple(self._run("main", places, results))
        made, constants = tuple(self.made), tuple(self.constants)
        return LaunchPlan(inputs, tuple(self.launches), outputs, made, constants, self.workspace)

    def _run(self, name: str, arguments: list[ArrayPlace], outputs: set[int]) -> list[ArrayPlace]:
        """Reads one function of the module.

        Args:
            name: Name of the function.
            arguments: Where its arguments lie.
            outputs: Hashes of the values that become outputs of the plan.

        Returns:
            Where its results lie.
        """
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
                found = [ArrayPlace("constant", len(self.constants) - 1)]
            elif kind == "stablehlo.reshape":
                found = operands
            elif _is_kernel(op):
                found = self._launch(op, operands, outputs)
            else:
                raise NotImplementedError(f"expected a function that only launches kernels, got {kind}")
            known.update(zip(map(hash, op.results), found, strict=True))
        raise AssertionError("a function without a return")

    def _launch(self, op: Any, operands: list[ArrayPlace], outputs: set[int]) -> list[ArrayPlace]:
        shared = _aliases(op)
        results = []
        for i, value in enumerate(op.results):
            shape, dtype = _shape(value), _dtype(value)
            if i in shared:
                results.append(operands[shared[i]])
            elif hash(value) in outputs:
                self.made.append((shape, dtype))
                results.append(ArrayPlace("output", len(self.made) - 1))
            else:
                results.append(ArrayPlace("workspace", self.workspace))
                size = int(np.prod(shape)) * getattr(torch, dtype).itemsize
                self.workspace += -(-size // ALIGNMENT) * ALIGNMENT
        self.launches.append(Launch(self.kernels[hash(op)], (*operands, *results)))
        return results


def _is_kernel(op: Any) -> bool:
    return op.operation.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"])


def _aliases(op: Any) -> dict[int, int]:
    """Index of the operand that a result shares its memory with, by the index of the result."""
    if "output_operand_aliases" not in op.attributes:
        return {}
    return dict(_alias(str(alias)) for alias in op.attributes["output_operand_aliases"])


def _alias(text: str) -> tuple[int, int]:
    """Indices of result and operand of an alias.

    Args:
        text: `#stablehlo.output_operand_alias<output_tuple_indices = [0], operand_index = 2, ...>`; no tuple index
            stands for the only result.
    """
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
