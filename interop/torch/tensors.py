"""The tensors of a torch-owned cache: allocated, mapped over cache rows, saved and loaded by name."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import torch

import tq_jax as tq
from interop.torch.dlpack import to_torch
from tq_jax.cache import require_counters
from tq_jax.store import named_leaves, spec_fields

SHARED = ("key_quantizer", "value_quantizer", "spec")
"""Fields of a cache that all rows share and that no append changes."""


def empty_tensors(spec: tq.CacheSpec, batch: int, device: torch.device, **options: Any) -> tq.Cache:
    """The tensors of an empty cache, allocated by torch; options as in `tq_jax.init_cache`."""
    # A cache of one token has the same quantizers, statistics and counters, and needs next to no memory.
    start = to_torch(tq.init_cache(dataclasses.replace(spec, max_tokens=1), batch, **options))
    start = jax.tree.map(lambda tensor: tensor.to(device, copy=True), start)
    return dataclasses.replace(start, spec=spec, **zero_pools(spec, batch, device))


def zero_pools(spec: tq.CacheSpec, batch: int, device: torch.device) -> dict[str, Any]:
    """Zeroed pages and full-precision slots, by field."""
    shapes = jax.eval_shape(functools.partial(tq.init_cache, spec, batch))

    def zeros(leaf: Any, dtype: str | None = None) -> torch.Tensor:
        return torch.zeros(leaf.shape, dtype=getattr(torch, dtype or str(leaf.dtype)), device=device)

    exact = {name: zeros(getattr(shapes, name), spec.dtype) for name in ("exact_keys", "exact_values")}
    return {"pages": jax.tree.map(zeros, shapes.pages), **exact}


def map_rows(arrays: tq.Cache, function: Callable[[torch.Tensor, bool], torch.Tensor]) -> tq.Cache:
    """Applies a function to every tensor that has rows.

    Args:
        arrays: The cache.
        function: Gets a tensor [rows, ...] and whether it is a pool, [rows, pages_per_row, ...]. Returns the tensor to
            put in its place, which may have another number of rows.

    Returns:
        The cache with the new tensors.
    """
    rows, pages_per_row = arrays.length.shape[0], arrays.spec.pages_per_row

    def on_pool(pool: torch.Tensor) -> torch.Tensor:
        return function(pool.unflatten(0, (rows, pages_per_row)), True).flatten(0, 1)

    own = [field.name for field in dataclasses.fields(arrays) if field.name not in (*SHARED, "pages")]
    changed = {name: jax.tree.map(lambda x: function(x, False), getattr(arrays, name)) for name in own}
    return dataclasses.replace(arrays, pages=jax.tree.map(on_pool, arrays.pages), **changed)


def move_rows(arrays: tq.Cache, source: dict[int, int], used: int) -> None:
    """Copies row source[i] to row i, in place.

    Args:
        arrays: Tensors of the cache.
        source: Old row of each row that changes.
        used: Pages per row to copy; the others are not in use.
    """

    def move(rows: torch.Tensor, paged: bool) -> torch.Tensor:
        part = rows[:, :used] if paged else rows
        part[to] = part[of]
        return rows

    device: Any = arrays.length.device
    to, of = torch.tensor(list(source.items()), device=device).T
    map_rows(arrays, move)


def grow_pools(arrays: tq.Cache, spec: tq.CacheSpec, used: int) -> tq.Cache:
    """The cache with pools of another size.

    Args:
        arrays: Tensors of the cache.
        spec: Its configuration with the new max_tokens.
        used: Pages per row to copy to the new pools; the others are not in use.
    """
    device: Any = arrays.length.device
    rows = arrays.length.shape[0]
    grown_pools = zero_pools(spec, rows, device)
    pages = grown_pools.pop("pages")
    if arrays.pages is not None:
        for pool, grown in zip(jax.tree.leaves(arrays.pages), jax.tree.leaves(pages), strict=True):
            old = pool.unflatten(0, (rows, arrays.spec.pages_per_row))
            grown.unflatten(0, (rows, spec.pages_per_row))[:, :used] = old[:, :used]
    if spec.compressed:
        return dataclasses.replace(arrays, pages=pages, spec=spec)
    for name, slots in grown_pools.items():
        slots[:, :, : arrays.spec.ring] = getattr(arrays, name)
    return dataclasses.replace(arrays, pages=pages, spec=spec, **grown_pools)


def named_tensors(arrays: tq.Cache) -> dict[str, Any]:
    """The tensors by dotted name, and the spec as JSON under "spec"."""
    return {"spec": json.dumps(spec_fields(arrays.spec), sort_keys=True), **named_leaves(arrays)}


def load_tensors(arrays: tq.Cache, state: dict[str, Any]) -> None:
    """Copies a state into tensors of the same spec; checks the whole state before any tensor changes.

    Args:
        arrays: Tensors of the cache.
        state: As `named_tensors` returns it.

    Raises:
        ValueError: For missing or unknown names, another spec, or tensors of wrong shape, type or counters.
    """
    own = named_tensors(arrays)
    if set(own) != set(state):
        raise ValueError(
            f"expected tensors {sorted(own)}, got missing={sorted(set(own) - set(state))} "
            f"unknown={sorted(set(state) - set(own))}"
        )
    if own["spec"] != state["spec"]:
        raise ValueError(f"expected a state of spec {own['spec']}, got {state['spec']}")
    names = [name for name in own if name != "spec"]
    for name in names:
        mine, new = own[name], state[name]
        if not isinstance(new, torch.Tensor) or new.shape != mine.shape or new.dtype != mine.dtype:
            got = f"{new.dtype}{list(new.shape)}" if isinstance(new, torch.Tensor) else type(new).__name__
            raise ValueError(f"expected {name} of {mine.dtype}{list(mine.shape)}, got {got}")
    require_counters(arrays.spec, state["length"].tolist(), state["compressed"].tolist())
    for name in names:
        own[name].copy_(state[name])
