"""The decoder that one device of a mesh is, inside `jax.shard_map`; see `sharding`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import tq_jax as tq
from pallas_kernels.layer import Heads, JointHeads
from tq_jax.models.decoder import Decoder
from tq_jax.models.last_token import last_places, token_of
from tq_jax.models.layer_caches import Caches
from tq_jax.models.mixture import Mixture
from tq_jax.shares import append_share, attend_shares, attend_stripes, own_counts


class Summed(nnx.Module):
    """A projection whose inputs are spread over a mesh axis, or a mixture of such ones: its outputs are summed over it.

    Args:
        inner: The module with this device's inputs, without a bias of its outputs.
        axis: The mesh axis.
    """

    def __init__(self, inner: nnx.Einsum | Mixture, axis: str):
        self.inner, self.axis = inner, axis

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The outputs, the same on all devices of the axis."""
        return lax.psum(self.inner(inputs), self.axis)


class SplitEmbed(nnx.Module):
    """An embedding whose vocabulary is spread over a mesh axis.

    Args:
        inner: The embedding of this device's part of the vocabulary.
        axis: The mesh axis.
    """

    def __init__(self, inner: nnx.Embed, axis: str):
        self.inner, self.axis = inner, axis

    @property
    def embedding(self) -> Any:
        """The rows of this device's part of the vocabulary."""
        return self.inner.embedding

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The embeddings of tokens of the whole vocabulary, the same on all devices of the axis."""
        size = self.embedding.shape[0]
        own = tokens - lax.axis_index(self.axis).astype(jnp.int32) * size
        found = self.inner(jnp.clip(own, 0, size - 1))
        exists = ((own >= 0) & (own < size))[..., None]
        return lax.psum(jnp.where(exists, found, jnp.zeros_like(found)), self.axis)


def _sum_outputs(block: Any, axis: str) -> None:
    """Lets a layer with this device's heads and channels give the outputs of the whole layer."""
    block.attention.output = Summed(block.attention.output, axis)
    if isinstance(block.mlp, Mixture):
        block.mlp = Summed(block.mlp, axis)
    else:
        block.mlp.down = Summed(block.mlp.down, axis)
    # A bias is broadcast to the shape of a layer's kernel that the projection was made with.
    block.attention.qkv.kernel_shape = block.attention.qkv.kernel.shape[1:]


class Share(Decoder):
    """A device's part of a decoder; hidden states and logits are the same on all devices.

    Args:
        part: The decoder with this device's part of every parameter; used up.
        heads_axis: Mesh axis over which heads and channels are spread; None if they are not.
    """

    def __init__(self, part: Decoder, *, heads_axis: str | None):
        self.config, self.runs, self.embedding_scale = part.config, part.runs, part.embedding_scale
        self.blocks, self.norm, self.head = part.blocks, part.norm, nnx.data(part.head)
        table = part.embedding.embedding if part.head is None else part.head.kernel
        self.vocabulary_axis = heads_axis if table.shape[0] < part.config.vocab_size else None
        self.embedding = part.embedding
        if self.vocabulary_axis is not None:
            self.embedding = SplitEmbed(part.embedding, self.vocabulary_axis)
        if heads_axis is not None:
            for block in self.blocks:
                _sum_outputs(block, heads_axis)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """See `Decoder.logits`; the parts of the vocabulary are gathered."""
        part = super().logits(hidden)
        if self.vocabulary_axis is None:
            return part
        return lax.all_gather(part, self.vocabulary_axis, axis=2, tiled=True)


class StripedShare(Share):
    """A `Share` whose cache holds this device's share of the tokens, see `tq_jax.shares`.

    Args:
        part: The decoder with this device's part of every parameter; used up.
        heads_axis: Mesh axis over which heads and channels are spread; None if they are not.
        sequence_axis: Mesh axis over which the tokens of the cache are spread.
    """

    def __init__(self, part: Decoder, *, heads_axis: str | None, sequence_axis: str):
        super().__init__(part, heads_axis=heads_axis)
        self.sequence_axis = sequence_axis

    def prefill(
        self,
        tokens: jax.Array,
        cache: Caches,
        *,
        lengths: jax.Array | None = None,
        sequences: jax.Array | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, Caches]:
        """See `Decoder.prefill`; every device runs its share of the tokens, and their hidden states are gathered.

        The last layer runs whole: its last tokens are on different devices, and attention goes round all of them.
        """
        if sequences is not None:
            raise NotImplementedError(
                f"sequences: None is supported with tokens spread over {self.sequence_axis!r}, got {sequences.shape}"
            )
        self.require_rows(cache, batch=tokens.shape[0])
        axis = self.sequence_axis
        (batch, count), devices = tokens.shape, lax.axis_size(axis)
        device = lax.axis_index(axis).astype(jnp.int32)
        stripes = jnp.pad(tokens, ((0, 0), (0, -count % devices))).reshape(batch, -1, devices)
        own = lax.dynamic_index_in_dim(stripes, device, axis=2, keepdims=False)
        lengths = jnp.full(batch, count, jnp.int32) if lengths is None else lengths
        counts = own_counts(lengths, device, devices)

        def attend(*chunk: jax.Array, window: int | None, scale: float) -> jax.Array:
            assert window is None, "refused by Layout.require"
            return attend_stripes(*chunk, axis=axis, scale=scale)

        start = jnp.broadcast_to(device, (batch,))
        hidden, cache = self._run_prompt(own, cache, start, lengths=counts, attend=attend, stride=devices)
        whole = lax.all_gather(hidden, axis, axis=2)  # [b, tokens per device, devices, dim]
        only = last_places(tokens, lengths) if last_only else None
        return token_of(whole.reshape(batch, -1, hidden.shape[2])[:, :count], only), cache

    def extend(
        self,
        tokens: jax.Array,
        cache: Caches,
        *,
        lengths: jax.Array | None = None,
        last_only: bool = False,
        **options: Any,
    ) -> tuple[jax.Array, Caches]:
        """See `Decoder.extend`; the last layer runs whole, as in `prefill`."""
        hidden, cache = super().extend(tokens, cache, lengths=lengths, **options)
        return token_of(hidden, last_places(tokens, lengths) if last_only else None), cache

    def _lengths(self, cache: Caches, *, batch: int) -> jax.Array:
        return lax.psum(super()._lengths(cache, batch=batch), self.sequence_axis)

    def _attend(
        self, query: jax.Array, cache: tq.Cache, *, chunk: Any, window: int | None, **options: Any
    ) -> jax.Array:
        """Attends over this device's share of the tokens; the results of all devices are merged."""
        if chunk is None:
            raise NotImplementedError(
                f"as_stored=False is supported with tokens spread over {self.sequence_axis!r}, got True"
            )
        assert window is None, "refused by Layout.require"
        return attend_shares(query, cache, chunk=chunk, axis=self.sequence_axis, **options)

    def _attend_joint(
        self, joint: JointHeads, cache: tq.Cache, *, window: int | None, **options: Any
    ) -> tuple[jax.Array, Heads]:
        heads = joint.split()
        chunk = heads.key, heads.value
        return self._attend(heads.query, cache, chunk=chunk, window=window, **options), heads

    def _append(self, cache: tq.Cache, *chunk: jax.Array, start: jax.Array, **options: Any) -> tq.Cache:
        """Appends the tokens of the chunk that live on this device."""
        return append_share(cache, *chunk, start=start, axis=self.sequence_axis, **options)
