"""The type checker behind the import hook of conftest."""

from collections.abc import Callable

import beartype

# The numeric tower lets an int stand where a float is asked for, as Python itself does.
_CHECK = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """Checks annotations at each call, except of constructors: JAX rebuilds pytrees with leaves that are no arrays."""
    return function if function.__name__ == "__init__" else _CHECK(function)
