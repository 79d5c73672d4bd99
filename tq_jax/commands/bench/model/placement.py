"""Where the decoder and the caches of `tq-jax bench model` lie: on one device, or spread over a mesh of several."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import typer

import tq_jax as tq
from tq_jax.models import Decoder
from tq_jax.models.generate import decode_loop
from tq_jax.models.layer_caches import Caches
from tq_jax.models.mesh_step import lower_step
from tq_jax.models.sharding import AXES, Layout, init_cache
from tq_jax.shares import share_spec

Loop = Callable[[Caches], tuple[Any, ...]]
"""A compiled loop of decoding, as a function of the cache, which is donated."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices that compute together.

    Attributes:
        axes: Name and size of each axis of the mesh; empty for one device.
    """

    axes: tuple[tuple[str, int], ...] = ()

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(size for _, size in self.axes)

    @functools.cached_property
    def layout(self) -> Layout | None:
        """The mesh; None for one device."""
        if not self.axes:
            return None
        names, sizes = zip(*self.axes, strict=True)
        return Layout(jax.make_mesh(sizes, names, devices=jax.devices()[: self.devices]))

    def as_dict(self) -> dict[str, Any]:
        """The mesh as a field of a row; no field for one device."""
        return {"mesh": dict(self.axes)} if self.axes else {}

    @property
    def label(self) -> str:
        """The mesh in a few characters, to stand behind the label of a task.

        Example:
            >>> Placement((("heads", 2),)).label, Placement().label
            (', mesh heads=2', '')
        """
        return f", mesh {','.join(f'{name}={size}' for name, size in self.axes)}" if self.axes else ""

    def cache_maker(self, decoder: Decoder, spec: tq.CacheSpec, batch: int) -> Callable[[], Caches]:
        """A function that makes an empty cache.

        Args:
            decoder: The decoder.
            spec: Spec of a layer, for whole sequences.
            batch: Number of sequences.
        """
        if self.layout is None:
            return jax.jit(functools.partial(decoder.init_cache, spec, batch=batch))
        where: dict[str, Any] = {"mesh": self.layout.mesh, "axes": self.layout.axes}
        return functools.partial(init_cache, decoder, spec, batch=batch, **where)

    def cache_shapes(self, decoder: Decoder, spec: tq.CacheSpec, batch: int) -> Caches:
        """The shapes of such a cache.

        Args:
            decoder: The decoder.
            spec: Spec of a layer, for whole sequences.
            batch: Number of sequences.
        """
        shares = 1 if self.layout is None else self.layout.shares
        return jax.eval_shape(functools.partial(decoder.init_cache, share_spec(spec, shares), batch=batch * shares))

    def compile_loop(
        self, decoder: Decoder, cache: Caches, arrays: Mapping[str, jax.Array], **options: Any
    ) -> tuple[Loop, int]:
        """Compiles the loop of decoding before its cache exists, so that both need not fit at once.

        Args:
            decoder: The decoder.
            cache: Shapes of the cache.
            arrays: Arrays of `tq_jax.models.generate.decode_loop` by name.
            **options: Its static options.

        Returns:
            The loop, whose results are those of `decode_loop`, and the bytes that it needs beside its arguments.
        """
        compiled, run = lower_step(decode_loop, decoder, self.layout, cache=cache, arrays=arrays, options=options)
        analysis = compiled.memory_analysis()
        return functools.partial(run, decoder), analysis.temp_size_in_bytes if analysis else 0


ONE_DEVICE = Placement()


def parse_mesh(text: str | None, *, available: int) -> Placement:
    """Parses a mesh like "heads=2,sequence=4".

    Args:
        text: Value of `--mesh`; None for one device.
        available: Number of devices.

    Raises:
        typer.BadParameter: For another form, other names, or more devices than there are.

    Example:
        >>> parse_mesh("heads=2,sequence=2", available=4)
        Placement(axes=(('heads', 2), ('sequence', 2)))
    """
    known, axes = (AXES.heads, AXES.sequence), {}
    for part in text.split(",") if text is not None else ():
        name, _, size = part.strip().partition("=")
        if name not in known or name in axes or not size.isdecimal() or int(size) < 1:
            raise typer.BadParameter(f"expected --mesh like heads=2 or heads=2,sequence=2, got {text!r}")
        axes[name] = int(size)
    found = Placement(tuple(axes.items()))
    if found.devices > available:
        raise typer.BadParameter(f"expected --mesh of at most {available} devices, got {text!r}, {found.devices}")
    return found


def device_bytes(tree: Any) -> int:
    """Bytes of the parts of arrays that lie on one device.

    Args:
        tree: A pytree of arrays, or of shapes without a sharding, which lie on one device.

    Example:
        >>> device_bytes({"a": jnp.zeros((2, 3), jnp.float32), "b": jnp.zeros(5, jnp.int8)})
        29
    """

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
