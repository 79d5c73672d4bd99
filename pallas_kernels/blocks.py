"""Blocks: all arrays of a page side by side in one run of bytes, as serving engines zero, copy and send pages.

Block b of a layer is a run of `stride` bytes. Page b lies at its start: the arrays of `pallas_kernels.pages` for one
page, in the order of the leaves of `Pages`, each without gaps and at a multiple of ALIGNMENT bytes. Behind the page may
lie anything, such as the pages of other layers.

    block b:  keys.packed | keys.scale | .. | values.packed | values.scale | .. | whatever fills the stride

Kernels address every array by the distance between pages alone. `PageRows` are arrays of such distances, for frameworks
that hand addresses to kernels; `Blocks` are the bytes themselves, for JAX. The pools of `Pages` are pages that lie
without gaps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, UInt8

from pallas_kernels.format import Code, VectorFormat
from pallas_kernels.pages import Pages, empty_pages
from pallas_kernels.pytree import pytree

ALIGNMENT = 16
"""Bytes of which the start of every array of every block is a multiple: kernels load as many at a time."""


@dataclasses.dataclass(frozen=True)
class ArrayPlace:
    """Where an array lies in a block.

    Attributes:
        start: First byte.
        shape: Shape of the array in one page.
        dtype: Name of its type.
    """

    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """What lies where in a block.

    Attributes:
        kv_heads: KV heads.
        page_size: Tokens per page.
        keys: Format of the keys.
        values: Format of the values.

    Example:
        >>> from tq_jax import QuantizerSpec
        >>> four = QuantizerSpec(dim=64, bits=4).format
        >>> layout = BlockLayout(2, 32, four, four)
        >>> [place.start for place in jax.tree.leaves(layout.places)], layout.page_bytes
        ([0, 2048, 2176, 4224], 4352)
    """

    kv_heads: int
    page_size: int
    keys: VectorFormat
    values: VectorFormat

    @property
    def places(self) -> Pages:
        """The place of each array, in the structure of `Pages`."""
        shapes = jax.eval_shape(lambda: empty_pages(1, self.kv_heads, self.page_size, self.keys, self.values))
        start = 0

        def take(leaf: jax.ShapeDtypeStruct) -> ArrayPlace:
            nonlocal start
            place = ArrayPlace(start, tuple(leaf.shape[1:]), str(leaf.dtype))
            start += -(-place.size // ALIGNMENT) * ALIGNMENT
            return place

        return jax.tree.map(take, shapes)

    @property
    def page_bytes(self) -> int:
        """Bytes from the start of a page to the end of its last array."""
        return max(place.start + place.size for place in jax.tree.leaves(self.places))

    def require_room(self, stride: int, start: int = 0) -> None:
        """Raises ValueError if pages do not fit into blocks, or if their arrays would start off alignment.

        Args:
            stride: Bytes from a block to the next one.
            start: First byte of the first page, counted from an address that every framework aligns.
        """
        if stride < self.page_bytes or stride % ALIGNMENT or start % ALIGNMENT:
            raise ValueError(
                f"expected blocks of at least {self.page_bytes} bytes, a multiple of {ALIGNMENT} bytes apart and "
                f"starting at one, got {stride} bytes apart and starting at {start}"
            )


class _LaidOut:
    """Sizes of pages in blocks, by their layout."""

    layout: BlockLayout

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.layout.kv_heads

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.layout.page_size


@pytree
class PageRows(_LaidOut, Pages):
    """Pages at any distance from each other: arrays [pages, distance], whose rows begin with the array of their page.

    The distance counts elements. What lies behind a page's array in its row is neither read nor written.

    Attributes:
        layout: Shapes of the arrays of one page (static).
    """

    layout: BlockLayout = dataclasses.field(metadata={"static": True})

    @property
    def page_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each array in one page, in the order of the leaves."""
        return tuple(place.shape for place in jax.tree.leaves(self.layout.places))

    def gather(self, ids: Int[Array, "b n"]) -> tuple[Code, Code]:
        """Keys and values of n pages of every sequence."""

        def read(rows: Array, place: ArrayPlace) -> Array:
            found = rows[ids][..., : math.prod(place.shape)]
            return found.reshape(*ids.shape, *place.shape)

        places = self.layout.places
        return jax.tree.map(read, (self.keys, self.values), (places.keys, places.values))


@pytree
class Blocks(_LaidOut):
    """The bytes of blocks, read page by page; a pytree.

    Attributes:
        memory: uint8 [blocks, stride].
        start: int32, first byte of each page in its block.
        layout: What lies where in a page (static).
    """

    memory: UInt8[Array, "blocks stride"]
    start: Int[Array, ""]
    layout: BlockLayout = dataclasses.field(metadata={"static": True})

    def gather(self, ids: Int[Array, "b n"]) -> tuple[Code, Code]:
        """Keys and values of n pages of every sequence; no other byte is touched."""
        size = self.layout.page_bytes
        corners = jnp.stack([ids.astype(jnp.int32), jnp.broadcast_to(self.start, ids.shape)], axis=-1)
        found = lax.gather(
            self.memory,
            corners,
            lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1)),
            slice_sizes=(1, size),
            mode=lax.GatherScatterMode.CLIP,
        )  # [b, n, size]

        def read(place: ArrayPlace) -> Array:
            part = found[..., place.start : place.start + place.size]
            width = jnp.dtype(place.dtype).itemsize
            shape = (*ids.shape, *place.shape)
            if width == 1:
                return part.reshape(shape)
            return lax.bitcast_convert_type(part.reshape(*shape, width), jnp.dtype(place.dtype))

        places = self.layout.places
        return jax.tree.map(read, (places.keys, places.values))
