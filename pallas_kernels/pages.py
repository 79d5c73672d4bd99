"""Pools of packed pages: the place of a token's codes in memory.

A page holds `page_size` consecutive tokens of one sequence for every KV head. Keys are token-major and values
channel-major, so that each matrix product sums over the contiguous axis. Scalars lie beside the codes, tokens last:

    keys.packed   uint8 [pages, h_kv, page_size, bytes]       values.packed   uint8 [pages, h_kv, bytes, page_size]
    keys.scale    [pages, h_kv, page_size]                    values.scale    [pages, h_kv, page_size]
    keys.signs    uint8 [pages, h_kv, page_size, dim/8]       values.zero     [pages, h_kv, groups, page_size]
    keys.residual [pages, h_kv, page_size]

If a format has several scales per vector, they lie before the token axis: [pages, h_kv, num_scales, page_size].
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.format import Code, CodebookFormat, GroupFormat, VectorFormat
from pallas_kernels.packing import packed_bytes
from pallas_kernels.pytree import pytree


@pytree
class Pages:
    """Pools of key and value pages; a pytree of arrays, laid out as in the module's docstring.

    Attributes:
        keys: Pools of keys, token-major.
        values: Pools of values, channel-major.
    """

    keys: Code
    values: Code

    @property
    def count(self) -> int:
        """Number of pages."""
        return self.values.scale.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.values.scale.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.values.scale.shape[-1]

    @property
    def page_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each array in one page, in the order of the leaves."""
        return tuple(pool.shape[1:] for pool in jax.tree.leaves(self))

    def gather(self, ids: Int[Array, "b n"]) -> tuple[Code, Code]:
        """Keys and values of n pages of every sequence, arrays [b, n, ...] of what lies in the pages."""
        return jax.tree.map(lambda pool: pool[ids], (self.keys, self.values))


def empty_pages(num_pages: int, kv_heads: int, page_size: int, keys: VectorFormat, values: VectorFormat) -> Pages:
    """Pools of zeros.

    Args:
        num_pages: Pages of the pools.
        kv_heads: KV heads.
        page_size: Tokens per page.
        keys: Format of the keys.
        values: Format of the values.
    """
    return Pages(
        _empty((num_pages, kv_heads), page_size, keys, channel_major=False),
        _empty((num_pages, kv_heads), page_size, values, channel_major=True),
    )


def _empty(lead: tuple[int, int], page_size: int, fmt: VectorFormat, *, channel_major: bool) -> Code:
    scalars = lead + ((fmt.num_scales,) if _several_scales(fmt) else ()) + (page_size,)
    bytes_shape = (fmt.packed_bytes, page_size) if channel_major else (page_size, fmt.packed_bytes)
    residual = isinstance(fmt, CodebookFormat) and fmt.residual
    return Code(
        packed=jnp.zeros(lead + bytes_shape, jnp.uint8),
        scale=jnp.zeros(scalars, fmt.scale_dtype),
        zero=jnp.zeros(scalars, fmt.scale_dtype) if isinstance(fmt, GroupFormat) else None,
        signs=jnp.zeros((*lead, page_size, packed_bytes(fmt.dim, 1)), jnp.uint8) if residual else None,
        residual=jnp.zeros((*lead, page_size), fmt.scale_dtype) if residual else None,
    )


def _several_scales(fmt: VectorFormat) -> bool:
    return isinstance(fmt, GroupFormat) or fmt.num_scales > 1


def write_tokens(pages: Pages, page: Int[Array, "b t"], slot: Int[Array, "b t"], keys: Code, values: Code) -> Pages:
    """Writes tokens into their pages, in place where the pool is donated or carried by a loop.

    Args:
        pages: The pools.
        page: Page of each token; a token whose page is at or beyond the pool's end is skipped.
        slot: Place of each token in its page.
        keys: Codes of the keys with batch axes [b, t, h_kv].
        values: Codes of the values with batch axes [b, t, h_kv].

    Returns:
        The pools with the tokens.
    """

    def tokens_then_bytes(pool: Array, new: Array) -> Array:
        return pool.at[page, :, slot].set(new, mode="drop")

    def tokens_last(pool: Array, new: Array) -> Array:
        return pool.at[page, ..., slot].set(new, mode="drop")

    def write(pool: Code, new: Code, *, channel_major: bool) -> Code:
        codes = tokens_last if channel_major else tokens_then_bytes
        scalars = {
            name: tokens_last(getattr(pool, name), getattr(new, name))
            for name in ("scale", "zero", "residual")
            if getattr(pool, name) is not None
        }
        if pool.signs is not None and new.signs is not None:
            scalars["signs"] = tokens_then_bytes(pool.signs, new.signs)
        return Code(packed=codes(pool.packed, new.packed), **scalars)

    return Pages(write(pages.keys, keys, channel_major=False), write(pages.values, values, channel_major=True))


@runtime_checkable
class Gathered(Protocol):
    """Pages that can be gathered: `Pages` and `pallas_kernels.blocks.Blocks`."""

    def gather(self, ids: Int[Array, "b n"]) -> tuple[Code, Code]:
        """Keys and values of n pages of every sequence, arrays [b, n, ...] of what lies in the pages."""
        ...


def read_pages(pages: Gathered, ids: Int[Array, "b n"]) -> tuple[Code, Code]:
    """Gathers n pages of every sequence.

    Args:
        pages: The pools, or the blocks that hold the pages.
        ids: Pages of each sequence.

    Returns:
        Keys with batch axes [b, n, h_kv, page_size] and channels last; values with batch axes [b, n, h_kv], then
        channels, then tokens.
    """
    keys, values = pages.gather(ids)
    if keys.scale.ndim == 5:
        keys = dataclasses.replace(keys, scale=jnp.swapaxes(keys.scale, -1, -2))
    return keys, values
