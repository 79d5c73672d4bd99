"""Decoders over several devices: KV heads over one axis of a mesh, the tokens of the cache over another.

A whole step - a prompt, a chunk or the loop of decoding - runs inside one `jax.shard_map`, in which every device is a
smaller decoder (`Share`) over a smaller cache: it has its own KV heads with their query heads, its own channels of the
feed-forward block and its own rows of the vocabulary. So Pallas kernels, which the compiler cannot partition, run as
they do on one device, and devices talk only where `mesh_step`, `share` or `tq_jax.shares` say so: two sums per layer,
one for the embedding, one gathering of the logits, and with shared tokens what attention needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import tq_jax as tq
from tq_jax.models.config import DecoderConfig
from tq_jax.models.decoder import Decoder
from tq_jax.models.families import FAMILIES
from tq_jax.models.layer_caches import Caches, map_caches
from tq_jax.shares import share_spec

P = PartitionSpec

_BY_HEADS = {"pages", "exact_keys", "exact_values", "mean", "weight", "query_power"}
"""Fields of a cache whose axes are rows (or their pages), then KV heads."""

_BY_ROWS = {"length", "compressed", "overflow", "query_count", "ready"}
"""Fields of a cache with an axis of rows and none of heads."""


@dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """Names of the axes of a mesh; an axis that the mesh does not have counts as one of size 1.

    Attributes:
        heads: The axis over which KV heads, feed-forward channels and the vocabulary are spread.
        sequence: The axis over which the tokens of the cache are spread.
    """

    heads: str = "heads"
    sequence: str = "sequence"


AXES = MeshAxes()
"""The names by default."""


@dataclass(frozen=True)
class Layout:
    """How a decoder and its cache lie on a mesh; static and hashable.

    Attributes:
        mesh: The devices, of any number and on any number of hosts.
        axes: Names of the mesh's axes.

    Raises:
        ValueError: If the mesh has an axis of another name.
    """

    mesh: Mesh
    axes: MeshAxes = AXES

    def __post_init__(self) -> None:
        expected = (self.axes.heads, self.axes.sequence)
        if not set(self.mesh.axis_names) <= set(expected):
            raise ValueError(f"mesh: expected axes among {expected}, got {self.mesh.axis_names}")
        # `jax.make_mesh` makes axes whose shardings are part of types; here shard_map says who holds what.
        types = (AxisType.Auto,) * len(self.mesh.axis_names)
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=types))

    @property
    def heads(self) -> int:
        """Devices over which KV heads are spread."""
        return self.mesh.shape.get(self.axes.heads, 1)

    @property
    def shares(self) -> int:
        """Devices over which the tokens of the cache are spread."""
        return self.mesh.shape.get(self.axes.sequence, 1)

    def named(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array whose first axes are spread over axes of the mesh, if the mesh has these."""
        return NamedSharding(self.mesh, P(*(axis if axis in self.mesh.axis_names else None for axis in axes)))

    def require(self, config: DecoderConfig) -> None:
        """Check that a decoder can be spread.

        Args:
            config: The decoder.

        Raises:
            NotImplementedError: If the number of devices of the heads axis does not divide `num_kv_heads` and
                `ffn_dim`, if the family does not share out heads, or if tokens are spread and a layer has a sliding
                window or scores have a soft-cap.
        """
        name = config.architecture
        if self.heads > 1 and not FAMILIES[name].shares_heads:
            raise NotImplementedError(
                f"mesh axis {self.axes.heads!r}: for {name} decoders size 1 is supported, got {self.heads}"
            )
        if self.shares > 1 and config.attention_softcap is not None:
            raise NotImplementedError(
                f"mesh axis {self.axes.sequence!r}: with a soft-cap of attention scores, which is "
                f"{config.attention_softcap} here, size 1 is supported, got {self.shares}"
            )
        for name in ("num_kv_heads", "ffn_dim"):
            if getattr(config, name) % self.heads:
                raise NotImplementedError(
                    f"mesh axis {self.axes.heads!r}: sizes that divide {name}={getattr(config, name)} are supported, "
                    f"got {self.heads}"
                )
        if self.shares > 1 and config.sliding_window is not None:
            raise NotImplementedError(
                f"mesh axis {self.axes.sequence!r}: with a sliding window, which is {config.sliding_window} tokens "
                f"here, size 1 is supported, got {self.shares}"
            )

    def parameter(self, path: Iterable[Any], config: DecoderConfig) -> NamedSharding:
        """The sharding of a parameter.

        Args:
            path: Its path in the decoder: names of attributes and numbers of runs of layers.
            config: The decoder.
        """
        heads, experts = self.axes.heads, config.num_experts > 0
        match [str(name) for name in path]:
            case ["blocks", _, "attention", "qkv", _]:
                return self.named(None, heads)  # [layers, h_kv, g + 2, d, dim], the bias without dim
            case ["blocks", _, "mlp", "gate_up" | "down", "kernel"] if experts:
                return self.named(None, None, None, heads)  # [layers, experts, 2, ffn_dim, dim], [.., dim, ffn_dim]
            case ["blocks", _, "mlp", "gate_up", _]:
                return self.named(None, None, heads)  # [layers, 2, ffn_dim, dim]
            case ["blocks", _, "attention", "output", _] | ["blocks", _, "mlp", "down", _]:
                return self.named(None, None, heads)  # [layers, dim, h_q * d] and [layers, dim, ffn_dim]
            case ["embedding", _] | ["head", _] if config.vocab_size % self.heads == 0:
                return self.named(heads)  # [vocab_size, dim]
            case _:
                return self.named()


def decoder_shardings(decoder: Decoder, mesh: Mesh, *, axes: MeshAxes = AXES) -> Any:
    """Where the parameters of a decoder lie on a mesh.

    Query heads, output channels of attention and KV heads are split together; norms are on every device, and so are
    embedding and head if the devices of the heads axis do not divide the vocabulary.

    Args:
        decoder: The decoder; its arrays may be abstract.
        mesh: The devices.
        axes: Names of the mesh's axes.

    Returns:
        A pytree like the decoder, of `NamedSharding`.

    Raises:
        NotImplementedError: If the decoder cannot be spread over the mesh, see `Layout.require`.
    """
    layout = Layout(mesh, axes)
    layout.require(decoder.config)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: layout.parameter([name for name in _names(path) if name != "value"], decoder.config), decoder
    )


def cache_shardings(cache: Caches, mesh: Mesh, *, axes: MeshAxes = AXES) -> Any:
    """Where the arrays of a cache lie on a mesh.

    Args:
        cache: From `init_cache`; its arrays may be abstract.
        mesh: The devices.
        axes: Names of the mesh's axes.

    Returns:
        A pytree like the cache, of `NamedSharding`: everything that has KV heads is spread over the heads axis,
        everything that has rows over the sequence axis; quantizers are on every device.
    """
    layout = Layout(mesh, axes)

    def place(path: Any, _: Any) -> NamedSharding:
        names = set(_names(path))
        if names & _BY_HEADS:
            return layout.named(axes.sequence, axes.heads)
        return layout.named(axes.sequence) if names & _BY_ROWS else layout.named()

    return jax.tree_util.tree_map_with_path(place, cache)


def shard(decoder: Decoder, mesh: Mesh, *, axes: MeshAxes = AXES) -> Decoder:
    """The decoder with its parameters on the devices of a mesh; nothing moves if they are there already.

    On several hosts every host calls this with the same decoder and keeps the parts of its own devices.

    Args:
        decoder: The decoder.
        mesh: The devices.
        axes: Names of the mesh's axes.

    Raises:
        NotImplementedError: If the decoder cannot be spread over the mesh, see `Layout.require`.

    Example:
        >>> from flax import nnx
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48)
        >>> mesh = jax.make_mesh((2,), ("heads",))
        >>> shard(Decoder(config, rngs=nnx.Rngs(0)), mesh).head.kernel[...].sharding.spec == jax.P("heads")
        True
    """
    return jax.tree.map(place, decoder, decoder_shardings(decoder, mesh, axes=axes))


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array on the devices of a mesh; on several hosts, each of which has the whole array, only its own parts."""
    if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def init_cache(decoder: Decoder, spec: tq.CacheSpec, *, batch: int, mesh: Mesh, axes: MeshAxes = AXES) -> Caches:
    """An empty cache on the devices of a mesh.

    Args:
        decoder: The decoder.
        spec: Spec of the cache of one layer, for whole sequences.
        batch: Number of sequences.
        mesh: The devices.
        axes: Names of the mesh's axes.

    Returns:
        A cache of n * num_layers * batch rows for n devices of the sequence axis, those of device 0 first; its spec is
        that of one device's tokens, see `tq_jax.shares.share_spec`. With n = 1 it has the arrays of
        `Decoder.init_cache`.

    Raises:
        ValueError: As `Decoder.init_cache`.
        NotImplementedError: If the decoder cannot be spread over the mesh, see `Layout.require`.
    """
    layout = Layout(mesh, axes)
    layout.require(decoder.config)
    own = share_spec(spec, layout.shares)
    given = {name: getattr(tq.init_cache(own, 0), name) for name in ("key_quantizer", "value_quantizer")}

    def make(given: dict[str, Any]) -> Caches:
        empty = decoder.init_cache(own, batch=batch * layout.shares)
        return map_caches(lambda one: dataclasses.replace(one, **given), empty)

    given = jax.tree.map(lambda x: place(x, layout.named()), given)
    shardings = cache_shardings(jax.eval_shape(make, given), mesh, axes=axes)
    return jax.jit(make, out_shardings=shardings)(given)


def _names(path: Any) -> list[str]:
    """The names and numbers along a path of a pytree."""
    return [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
