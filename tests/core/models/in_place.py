"""What it means that a compiled program updates a cache in place."""

import re
from typing import Any

import jax

from tq_jax.models.layer_caches import Caches, parts_of


def check_in_place(compiled: Any, cache: Caches) -> None:
    """The arrays of the cache are aliased, and the program neither converts nor copies one of them."""
    text = compiled.as_text()
    stored = jax.tree.leaves([(one.exact_keys, one.exact_values, one.pages) for one in parts_of(cache)])
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in stored)
    for leaf in stored:
        shape = ",".join(map(str, leaf.shape))
        kinds = set(re.findall(rf"(\w+)\[{shape}\]", text))
        assert len(kinds) == 1, f"[{shape}] is converted: {kinds}"
        assert not re.findall(rf"\[{shape}\]\S* copy\(", text), f"[{shape}] is copied"
