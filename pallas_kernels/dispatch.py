"""The choice between an operation's definition in jnp and its kernel; no other module makes it."""

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import jax

from pallas_kernels.compat.versions import lowers_for_gpu

Implementation = Literal["auto", "reference", "triton"]
"""How an operation is computed: "reference" is obvious jnp on any device; "triton" is the Pallas kernel, which runs
interpreted, slowly, where JAX has no GPU; "auto" is the kernel on a GPU for every case that it supports, and the
reference elsewhere."""

Chosen = Literal["reference", "triton"]


def choose(implementation: str, *, op: str, check: Callable[[], None], stacklevel: int = 3) -> Chosen:
    """Resolves "auto", and refuses names that do not exist and kernels that do not support the case.

    Args:
        implementation: One of `Implementation`.
        op: Name of the operation, for messages.
        check: Raises NotImplementedError, naming value and limit, if the kernel does not support the case.
        stacklevel: As in `warnings.warn`: 3 names the caller of the operation that calls this function.

    Returns:
        "reference" or "triton".

    Raises:
        NotImplementedError: For another name, or for "triton" if the kernel does not support the case.

    Warns:
        UserWarning: If "auto" takes the reference on a GPU, with the reason (once per place, by Python's default).

    Example:
        >>> choose("reference", op="attend", check=lambda: None)
        'reference'
    """
    if implementation not in get_args(Implementation):
        raise NotImplementedError(f"implementation={implementation!r}; {op} has: {get_args(Implementation)}")
    if implementation == "reference" or (implementation == "auto" and interprets()):
        return "reference"
    try:
        check()
    except NotImplementedError as error:
        if implementation == "triton":
            raise
        warnings.warn(f"{op} runs as the slow reference: {error}", stacklevel=stacklevel)
        return "reference"
    return "triton"


def interprets() -> bool:
    """Whether kernels run as jnp by default: where JAX neither has a GPU nor lowers for an absent one."""
    return jax.default_backend() != "gpu" and not lowers_for_gpu()
