"""JAX functions of Pallas kernels and simple operations between them, run by torch.

A kernel is launched; an operation between kernels is the torch function of the same meaning. This suits functions that
are a few kernels and little else, like attention of long chunks. Nothing waits for the GPU, so that a CUDA graph can
capture the whole function.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.extend.core import Literal

from interop.launcher import program as launcher
from interop.launcher.constants import split_constants

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
"""Operations that call another function, and the name of the parameter that holds this function."""


def _broadcast(x: torch.Tensor, *, shape: tuple[int, ...], broadcast_dimensions: tuple[int, ...]) -> torch.Tensor:
    sizes = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
        sizes[axis] = size
    return x.reshape(sizes).expand(shape)


def _slice(x: torch.Tensor, *, start_indices: Any, limit_indices: Any, strides: Any) -> torch.Tensor:
    steps = strides or (1,) * x.ndim
    return x[tuple(slice(*part) for part in zip(start_indices, limit_indices, steps, strict=True))]


OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "abs": torch.abs,
    "add": torch.add,
    "and": torch.logical_and,
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda *x, dimension: torch.cat(x, dimension),
    "convert_element_type": lambda x, *, new_dtype: x.to(getattr(torch, str(new_dtype))),
    "div": torch.div,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "gt": torch.gt,
    "log": torch.log,
    "log2": torch.log2,
    "lt": torch.lt,
    "max": torch.maximum,
    "min": torch.minimum,
    "mul": torch.mul,
    "reduce_max": lambda x, *, axes: torch.amax(x, axes),
    "reduce_min": lambda x, *, axes: torch.amin(x, axes),
    "reduce_sum": lambda x, *, axes: torch.sum(x, axes),
    "reshape": lambda x, *, new_sizes: x.reshape(new_sizes),
    "select_n": lambda which, no, yes: torch.where(which, yes, no),
    "slice": _slice,
    "squeeze": lambda x, *, dimensions: x.squeeze(dimensions),
    "sub": torch.sub,
    "transpose": lambda x, *, permutation: x.permute(permutation),
}
"""The torch function of each JAX operation, by the name of the operation."""

PARAMETERS = {
    "broadcast_in_dim": ("shape", "broadcast_dimensions"),
    "concatenate": ("dimension",),
    "convert_element_type": ("new_dtype",),
    "reduce_max": ("axes",),
    "reduce_min": ("axes",),
    "reduce_sum": ("axes",),
    "reshape": ("new_sizes",),
    "slice": ("start_indices", "limit_indices", "strides"),
    "squeeze": ("dimensions",),
    "transpose": ("permutation",),
}
"""Parameters of JAX operations that the torch functions take; other parameters only concern XLA's layout."""


class TorchFunction:
    """A JAX function of kernels and simple operations between them, as a function of torch tensors.

    The function is traced once. Each step of the trace becomes a launch (`TorchProgram`) or a function of `OPERATIONS`,
    and a call runs the steps in order. `TorchProgram` alone is faster but takes functions without such operations only.

    Args:
        function: The function, with everything static bound.
        *examples: Its arguments, as pytrees of tensors with the shapes and types of every call; meta tensors will do.
        device: The GPU that it runs on.

    Raises:
        NotImplementedError: For an operation that is not in `OPERATIONS`.
    """

    def __init__(self, function: Callable, *examples: Any, device: torch.device) -> None:
        self.device = device
        shapes = jax.tree.map(launcher.struct, examples)
        split, leaves = split_constants(function, *shapes), jax.tree.leaves(shapes)
        self._shapes = tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves)
        self._used = split.used
        self._values = [launcher.constant(value, device) for value in split.values]
        values = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in split.values]
        jaxpr = jax.make_jaxpr(split.function)([*values, *(leaves[i] for i in split.used)]).jaxpr
        self._inputs = jaxpr.invars
        self._literals: dict[Any, torch.Tensor] = {}
        names: dict[Any, Any] = {}
        self._steps = list(self._read(jaxpr, names))
        self._outputs = [self._name(atom, names) for atom in jaxpr.outvars]

    def check(self, tensors: Sequence[launcher.Argument]) -> None:
        """Raises ValueError for tensors unlike the examples."""
        launcher.require_alike(tensors, self._shapes, self.device)

    def launch(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Checks flat inputs and runs the function on them, on the current stream."""
        self.check(tensors)
        return self._run(tensors)

    def bind(self, fixed: Sequence[launcher.Argument]) -> launcher.Bound:
        """The function with its first flat inputs bound, as a function of the others; nothing is checked."""
        return lambda given, *, out=(): self._run([*fixed, *given], out)

    def _run(self, tensors: Sequence[launcher.Argument], out: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, ...]:
        known: dict[Any, Any] = dict(self._literals)
        known.update(zip(self._inputs, [*self._values, *(tensors[i] for i in self._used)], strict=True))
        for run, operands, results in self._steps:
            known.update(zip(results, run([known[name] for name in operands]), strict=True))
        made = [known[name] for name in self._outputs]
        given = [tensor.copy_(x) for tensor, x in zip(out, made, strict=False)]
        return (*given, *(x.contiguous() for x in made[len(out) :]))

    def _read(self, jaxpr: Any, names: dict[Any, Any]) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        """Yields the steps of a function, with the steps of the functions that it calls.

        Args:
            jaxpr: The function.
            names: Key of each variable's tensor in a run, for variables whose key is not the variable; written here.

        Yields:
            Function of a step, keys of its operands, keys of its results.
        """
        for equation in jaxpr.eqns:
            kind, operands = equation.primitive.name, [self._name(atom, names) for atom in equation.invars]
            if kind in CALLS:
                inner = equation.params[CALLS[kind]]
                if inner.consts:
                    raise NotImplementedError(f"expected functions without captured arrays, got {len(inner.consts)}")
                inside = dict(zip(inner.jaxpr.invars, operands, strict=True))
                yield from self._read(inner.jaxpr, inside)
                found = [self._name(atom, inside) for atom in inner.jaxpr.outvars]
                names.update(zip(equation.outvars, found, strict=True))
                continue
            # A function that is called twice has the same variables each time, so keys are new objects.
            results = [object() for _ in equation.outvars]
            names.update(zip(equation.outvars, results, strict=True))
            yield self._step(equation), operands, results

    def _name(self, atom: Any, names: dict[Any, Any]) -> Any:
        if isinstance(atom, Literal):
            name, kind = object(), getattr(torch, str(np.asarray(atom.val).dtype))
            self._literals[name] = torch.tensor(np.asarray(atom.val).item(), dtype=kind, device=self.device)
            return name
        return names.get(atom, atom)

    def _step(self, equation: Any) -> Callable[[list[torch.Tensor]], Any]:
        kind = equation.primitive.name
        if kind == "pallas_call":
            avals: list[Any] = [atom.aval for atom in equation.invars]
            examples = [torch.empty(a.shape, dtype=getattr(torch, str(a.dtype)), device="meta") for a in avals]
            program = launcher.TorchProgram(_Call(equation), *examples, device=self.device)
            run = program.bind(())
            return lambda x: run([tensor.contiguous() for tensor in x])
        if kind not in OPERATIONS:
            raise NotImplementedError(f"torch runs kernels and {sorted(OPERATIONS)}, got {kind}")
        operation = OPERATIONS[kind]
        options = {name: equation.params[name] for name in PARAMETERS.get(kind, ())}
        return lambda x: [operation(*x, **options)]


class _Call:
    """One equation of a jaxpr as a function of arrays."""

    def __init__(self, equation: Any) -> None:
        self._equation = equation

    def __call__(self, *arguments: Any) -> Any:
        return self._equation.primitive.bind(*arguments, **self._equation.params)
