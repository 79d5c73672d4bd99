"""Steps of a decoder, which are prompts, chunks or loops of decoding: on a device, or by `jax.shard_map` on a mesh."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

import tq_jax as tq
from tq_jax.models.decoder import Decoder
from tq_jax.models.layer_caches import Caches, map_caches
from tq_jax.models.sharding import Layout, cache_shardings, decoder_shardings, place
from tq_jax.models.share import Share, StripedShare

P = PartitionSpec


def run_step(
    step: Callable[..., tuple[Any, ...]],
    decoder: Decoder,
    layout: Layout | None,
    *,
    cache: Caches,
    arrays: Mapping[str, jax.Array],
    options: Mapping[str, Any],
    donate: bool = True,
) -> tuple[Any, ...]:
    """Run a step of `generate` on one device or on a mesh.

    Args:
        step: A function of a decoder, a cache, arrays and options whose last result is the cache afterwards; what it
            returns besides is the same on all devices.
        decoder: The decoder, from `shard` if there is a mesh.
        layout: The mesh; None for one device.
        cache: The cache, from `init_cache` if there is a mesh.
        arrays: Further arrays by name; all devices get all of them.
        options: Static options by name.
        donate: Whether the cache is donated, on a mesh. On one device the step decides.

    Returns:
        The results of the step.
    """
    if layout is None:
        return step(decoder, cache=cache, **arrays, **options)
    run = _donating if donate else _keeping
    arrays = {name: place(array, layout.named()) for name, array in arrays.items()}
    found, after = run(decoder, cache, arrays, step=step, layout=layout, options=tuple(options.items()))
    return (*found, after)


def lower_step(
    step: Callable[..., tuple[Any, ...]],
    decoder: Decoder,
    layout: Layout | None,
    *,
    cache: Caches,
    arrays: Mapping[str, jax.Array],
    options: Mapping[str, Any],
) -> tuple[Compiled, Callable[[Decoder, Caches], tuple[Any, ...]]]:
    """Compile a step before its cache exists.

    Args:
        step: See `run_step`, as for the others; on one device a function made by `jax.jit`.
        decoder: The decoder.
        layout: The mesh; None for one device.
        cache: The cache or its shapes, as `init_cache` makes it.
        arrays: Further arrays by name.
        options: Static options by name.

    Returns:
        The compiled program, and the step as a function of the decoder and a cache, which is donated if a mesh or the
        step says so.
    """
    if layout is None:
        program = cast(Any, step).lower(decoder, cache=cache, **arrays, **options).compile()
        return program, lambda decoder, cache: program(decoder, cache=cache, **arrays)
    shardings = cache_shardings(cache, layout.mesh, axes=layout.axes)
    shapes = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), cache, shardings)
    placed = {name: place(array, layout.named()) for name, array in arrays.items()}
    given: dict[str, Any] = {"step": step, "layout": layout, "options": tuple(options.items())}
    program = _donating.lower(decoder, shapes, placed, **given).compile()

    def run(decoder: Decoder, cache: Caches) -> tuple[Any, ...]:
        found, after = program(decoder, cache, placed)
        return (*found, after)

    return program, run


def run_on_mesh(
    decoder: Decoder,
    cache: Caches,
    arrays: Mapping[str, jax.Array],
    *,
    step: Callable[..., tuple[Any, ...]],
    layout: Layout,
    options: tuple[tuple[str, Any], ...] = (),
) -> tuple[tuple[Any, ...], Caches]:
    """Run a step on a mesh, under a `jax.jit` of the caller; for loops other than those of `generate`.

    Args:
        decoder: The decoder, from `shard`.
        cache: The cache, from `init_cache`.
        arrays: Further arrays by name; all devices get all of them.
        step: See `run_step`; every device calls it with its `Share` of the decoder and of the cache.
        layout: The mesh.
        options: Names and values of static options.

    Returns:
        The results of the step but the last, and the cache.
    """
    axes = layout.axes

    def with_heads(cache: Caches, heads: int) -> Caches:
        def changed(one: tq.Cache) -> tq.Cache:
            return dataclasses.replace(one, spec=dataclasses.replace(one.spec, num_kv_heads=heads))

        return map_caches(changed, cache)

    shardings = cache_shardings(cache, layout.mesh, axes=axes), jax.tree.map(lambda _: layout.named(), dict(arrays))
    leaves, tree = jax.tree.flatten((cache, dict(arrays)))
    held = _Held(tree, tuple(zip(leaves, jax.tree.leaves(shardings), strict=True)))

    def run(decoder: Decoder, kept: list[jax.Array]) -> tuple[tuple[Any, ...], list[jax.Array]]:
        share = _share(decoder, layout)
        cache, arrays = held.whole(kept, local=True)
        heads = cache.spec.num_kv_heads
        own = with_heads(cache, heads // layout.heads)
        *found, after = inspect.unwrap(step)(share, cache=own, **arrays, **dict(options))
        return tuple(found), _with_elements(with_heads(after, heads))

    parameters = jax.tree.map(lambda sharding: sharding.spec, decoder_shardings(decoder, layout.mesh, axes=axes))
    kept, specs = held.with_elements
    count = len(_with_elements(cache))
    # Pallas calls do not say over which axes their results vary, so nothing is checked.
    spread = jax.shard_map(
        run, mesh=layout.mesh, in_specs=(parameters, specs), out_specs=(P(), specs[:count]), check_vma=False
    )
    found, after = spread(decoder, kept)
    return found, held.whole([*after, *kept[count:]], local=False)[0]


def _share(part: Decoder, layout: Layout) -> Share:
    """The decoder that one device is, made of its part of every parameter."""
    heads = layout.axes.heads if layout.heads > 1 else None
    if layout.shares == 1:
        return Share(part, heads_axis=heads)
    return StripedShare(part, heads_axis=heads, sequence_axis=layout.axes.sequence)


def _with_elements(tree: Any) -> list[jax.Array]:
    """The leaves of a pytree that have elements."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.size]


@dataclasses.dataclass(frozen=True)
class _Held:
    """A pytree of arrays, of which those without elements stay outside of `jax.shard_map`.

    XLA takes operands without elements for constants, on which the partitioner of JAX 0.11 crashes.

    Attributes:
        tree: Structure of the pytree.
        leaves: Its leaves, each with its sharding.
    """

    tree: Any
    leaves: tuple[tuple[jax.Array, NamedSharding], ...]

    @property
    def with_elements(self) -> tuple[list[jax.Array], list[P]]:
        """The leaves that have elements, and how each is spread."""
        found = [(leaf, sharding.spec) for leaf, sharding in self.leaves if leaf.size]
        return [leaf for leaf, _ in found], [spec for _, spec in found]

    def whole(self, kept: Sequence[jax.Array], *, local: bool) -> Any:
        """The pytree of leaves that have elements, of one device or of all, and of leaves without elements."""
        rest = iter(kept)
        shapes = [sharding.shard_shape(leaf.shape) if local else leaf.shape for leaf, sharding in self.leaves]
        return self.tree.unflatten(
            next(rest) if leaf.size else jnp.zeros(shape, leaf.dtype)
            for (leaf, _), shape in zip(self.leaves, shapes, strict=True)
        )


_STATIC = ("step", "layout", "options")
_keeping = partial(jax.jit, static_argnames=_STATIC)(run_on_mesh)
_donating = partial(jax.jit, static_argnames=_STATIC, donate_argnames=("cache",))(run_on_mesh)
