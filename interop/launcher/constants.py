"""A JAX function split in two: the part that depends on constants alone, computed now, and the rest, to be lowered."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal


@dataclasses.dataclass(frozen=True)
class Split:
    """The rest of a function, after the part that depends on constants alone.

    Attributes:
        function: The rest, from a list of arrays to a list of arrays. Its inputs are `values`, then the inputs in use.
        values: Results of the first part that the rest needs.
        used: Indices of the inputs in use, among the flat inputs of the whole function.
    """

    function: Callable[[Sequence[Any]], list[Any]]
    values: list[np.ndarray]
    used: list[int]


def split_constants(function: Callable, *shapes: Any) -> Split:
    """Runs the part of a function that depends on constants alone, and returns the rest.

    Args:
        function: A function of pytrees of arrays.
        *shapes: Its inputs, as pytrees of `jax.ShapeDtypeStruct`.

    Returns:
        The rest of the function and the values that it needs.

    Example:
        >>> import jax.numpy as jnp
        >>> def f(x, unused):
        ...     return x + jnp.sum(jnp.arange(4))
        >>> shape = jax.ShapeDtypeStruct((), "int32")
        >>> rest = split_constants(f, shape, shape)
        >>> rest.values, rest.used, rest.function([rest.values[0], 1])
        ([array(6, dtype=int32)], [0], [Array(7, dtype=int32)])
    """
    closed = jax.make_jaxpr(function)(*shapes)
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    rest = []
    for equation in jaxpr.eqns:
        if all(isinstance(atom, Literal) or atom in known for atom in equation.invars):
            _bind(equation, known)
        else:
            rest.append(equation)
    needed = [atom for equation in rest for atom in equation.invars] + list(jaxpr.outvars)
    needed = list(dict.fromkeys(atom for atom in needed if not isinstance(atom, Literal)))
    values = [atom for atom in needed if atom in known]
    used = [i for i, atom in enumerate(jaxpr.invars) if atom in needed]

    def remaining(arrays: Sequence[Any]) -> list[Any]:
        found = dict(zip([*values, *(jaxpr.invars[i] for i in used)], arrays, strict=True))
        for equation in rest:
            _bind(equation, found)
        return [_value(atom, found) for atom in jaxpr.outvars]

    return Split(remaining, [np.asarray(known[atom]) for atom in values], used)


def _bind(equation: Any, found: dict[Any, Any]) -> None:
    """Runs one equation on the values found so far."""
    results = equation.primitive.bind(*(_value(atom, found) for atom in equation.invars), **equation.params)
    found.update(zip(equation.outvars, results if equation.primitive.multiple_results else [results], strict=True))


def _value(atom: Any, found: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, Literal) else found[atom]
