"""Operations that have no gradient say so by their own name, in place of JAX's words about a loop inside them."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def forward_only(out: Array, op: str) -> Array:
    """The same array, with derivatives along a direction (`jax.jvp`) but no gradient.

    Args:
        out: The output of an operation.
        op: Name of the operation, for the message.

    Raises:
        NotImplementedError: When a gradient (`jax.grad`, `jax.vjp`) reaches the array.

    Example:
        >>> jax.grad(lambda x: forward_only(x, "attend"))(1.0)
        Traceback (most recent call last):
        NotImplementedError: attend: derivatives along a direction (jax.jvp) are supported, got a gradient ...
    """

    @jax.custom_jvp
    def same(x: Array) -> Array:
        return x

    @same.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return primals[0], _forward_only_p.bind(tangents[0], op=op)

    return same(out)


def without_derivative(inputs: Any, op: str) -> Any:
    """The same pytree of arrays, without any derivative.

    Args:
        inputs: Inputs of an operation.
        op: Name of the operation, for the message.

    Raises:
        NotImplementedError: When an array of the tree is differentiated.
    """

    @jax.custom_jvp
    def same(tree: Any) -> Any:
        return tree

    @same.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{op} by GPU kernels: implementation='reference' has derivatives along a direction (jax.jvp), got a "
            "derivative through implementation='triton'"
        )

    return same(inputs)


def _refuse(cotangent: Any, x: Any, *, op: str) -> Any:
    raise NotImplementedError(
        f"{op}: derivatives along a direction (jax.jvp) are supported, got a gradient (jax.grad): train with "
        "the vectors themselves, and compress them afterwards"
    )


_forward_only_p = Primitive("forward_only")
_forward_only_p.def_impl(lambda x, *, op: x)
_forward_only_p.def_abstract_eval(lambda x, *, op: x)
ad.deflinear2(_forward_only_p, _refuse)
batching.defvectorized(_forward_only_p)
mlir.register_lowering(_forward_only_p, lambda ctx, x, *, op: [x])
