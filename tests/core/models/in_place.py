"""What it means that a compiled program updates a cache in place."""

import re
from typing import Any

import jax

import tq_jax as tq


def check_in_place(compiled: Any, cache: tq.Cache) -> None:
    """The arrays of the cache are aliased, and the program neither converts nor copies one of them."""
    text = compiled.as_text()
    stored = [cache.exact_keys, cache.exact_values, *jax.tree.leaves(cache.pages)]
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in stored)
    for leaf in stored:
        shape = ",".join(map(str, leaf.shape))
        kinds = set(re.findall(rf"(\w+)\[{shape}\]", text))
        assert len(kinds) == 1, f"[{shape}] is converted: {kinds}"
        assert not re.findall(rf"\[{shape}\]\S* copy\(", text), f"[{shape}] is copied"
