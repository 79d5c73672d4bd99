"""Frozen dataclasses that are pytrees."""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax

Class = TypeVar("Class", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree(cls: Class) -> Class:
    """A class decorator: a frozen dataclass, registered as a pytree of its fields.

    Args:
        cls: A class with annotated fields; those with the metadata {"static": True} are no part of the leaves.

    Returns:
        The class.

    Example:
        >>> @pytree
        ... class Pair:
        ...     left: int
        ...     right: int
        >>> jax.tree.leaves(Pair(1, 2))
        [1, 2]
    """
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))
