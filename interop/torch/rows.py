"""The rows of a torch-owned cache: their tensors, and the numbers of tokens that the host keeps of them."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import torch

import tq_jax as tq
from interop.torch.dlpack import to_jax
from interop.torch.placement import counters_after, integers_of_rows, require_room, row_integers
from interop.torch.tensors import grow_pools, load_tensors, map_rows, move_rows, named_tensors

MOST_SHOWN = 8
"""Rows whose lengths the short description of a cache lists one by one."""


def bits_label(spec: tq.CacheSpec) -> str:
    """Bits of keys and values, like K4/V3."""
    if spec.key is None or spec.value is None:
        return "full precision"
    return f"K{spec.key.bits:g}/V{spec.value.bits:g}"


class CacheRows:
    """Tensors and counters of a cache, without the operations that read or write tokens.

    Cropping drops tokens and restores none: a token that has left the window stays compressed, so after a crop the
    window holds fewer tokens than it could until new ones fill it. Key statistics, once fixed, stay.

    Attributes:
        arrays: The cache as a pytree of tensors (bfloat16 where JAX holds its bits). Write it only through methods.
        device: Where the tensors live.
        lengths: Tokens of each row.
        compressed: Tokens in the pages of each row.
    """

    device: torch.device

    def _adopt(self, arrays: tq.Cache) -> None:
        """Takes over tensors and reads the counters that the host keeps.

        Raises:
            NotImplementedError: For a cache that overwrites tokens behind a sliding window.
        """
        if arrays.spec.sliding_window is not None:
            raise NotImplementedError(
                f"a cache of torch tensors keeps all tokens, got sliding_window={arrays.spec.sliding_window}"
            )
        self.arrays: Any = arrays  # a Cache, of leaves that its annotations do not know
        self.lengths = tuple(arrays.length.tolist())
        self.compressed = tuple(arrays.compressed.tolist())
        self._ready = arrays.statistics is None or bool(arrays.statistics.ready.all())
        self._view: Any = None

    def __repr__(self) -> str:
        few = self.rows <= MOST_SHOWN
        lengths = f"lengths={self.lengths}" if few else f"lengths from {min(self.lengths)} to {max(self.lengths)}"
        size = f"{self.nbytes / 1e6:,.2f} MB on {self.device}"
        return f"{type(self).__name__}({bits_label(self.spec)}, rows={self.rows}, {lengths}, {size})"

    @property
    def spec(self) -> tq.CacheSpec:
        """Configuration of the cache."""
        return self.arrays.spec

    @property
    def rows(self) -> int:
        """Number of cache rows, the independent sequences."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the cache owns."""
        return sum(tensor.nbytes for tensor in jax.tree.leaves(self.arrays))

    def as_jax(self) -> Any:
        """The cache as JAX arrays over the same memory, to read; `interop.torch.dlpack` says how long it is current."""
        if self.device.type != "cpu":
            return to_jax(self.arrays)
        if self._view is None:
            self._view = to_jax(self.arrays)
        return self._view

    def advance(self, counts: int | Sequence[int] = 1) -> None:
        """Counts the tokens of a replay: call it before a CUDA graph that captured an append is replayed.

        A replay writes the counters on the GPU only; this method keeps the host's counters in step.

        Args:
            counts: New tokens of each row; an integer stands for all rows.

        Raises:
            ValueError: For a row without room, a negative count, or another number of counts than rows.
        """
        given = integers_of_rows(counts, self.rows)
        if len(given) != self.rows or min(given, default=0) < 0:
            raise ValueError(f"expected a count of at least 0, or one for each of {self.rows} rows, got {counts}")
        require_room(self.spec, self.lengths, given)
        self._advance(given)

    def _advance(self, counts: tuple[int, ...]) -> None:
        self.lengths, self.compressed = counters_after(self.spec, self.lengths, self.compressed, counts)

    def crop(self, length: int | Sequence[int]) -> None:
        """Drops the latest tokens, so that each row has at most `length`.

        Args:
            length: Tokens to keep of each row; an integer stands for all rows.

        Raises:
            ValueError: For a negative length, or another number of lengths than rows.
        """
        wanted = integers_of_rows(length, self.rows)
        if len(wanted) != self.rows or min(wanted, default=0) < 0:
            raise ValueError(f"expected a length of at least 0, or one for each of {self.rows} rows, got {length}")
        lengths = tuple(min(old, new) for old, new in zip(self.lengths, wanted, strict=True))
        pages = zip(self.compressed, lengths, strict=True)
        self._count(lengths, tuple(min(old, max(new - self.spec.sinks, 0)) for old, new in pages))

    def reorder(self, index: Sequence[int] | torch.Tensor) -> None:
        """Makes row i what row index[i] was.

        If there are as many indices as rows, the rows are reordered in place: only rows that change are copied, and of
        their pages only those in use. Otherwise the cache gets new tensors with another number of rows.

        Args:
            index: Old row of each new row.

        Raises:
            ValueError: For indices outside the rows.
        """
        source = list(row_integers(index))
        if any(not 0 <= i < self.rows for i in source):
            raise ValueError(f"expected rows from 0 to {self.rows - 1}, got {source}")
        if len(source) != self.rows:
            places = torch.tensor(source, dtype=torch.int64, device=self.device)
            self._adopt(map_rows(self.arrays, lambda rows, _: rows[places]))
            return
        moved = {i: old for i, old in enumerate(source) if i != old}
        if not moved:
            return
        used = -(-max(self.compressed[old] for old in moved.values()) // self.spec.page_size)
        move_rows(self.arrays, moved, used)
        self.lengths = tuple(self.lengths[old] for old in source)
        self.compressed = tuple(self.compressed[old] for old in source)

    def reserve(self, max_tokens: int) -> None:
        """Makes room for `max_tokens` tokens per row; does nothing if there is as much room already.

        The pages in use, or all tokens in full precision, are copied to larger pools.

        Raises:
            ValueError: If the cache was made for fewer tokens than its sinks and window take, whose slots would move.
        """
        old = self.spec
        if max_tokens <= old.max_tokens:
            return
        new = old.with_room(max_tokens)
        if old.compressed and (new.sinks, new.ring) != (old.sinks, old.ring):
            raise ValueError(
                f"expected a cache of at least {new.sinks + new.ring} tokens to grow, got max_tokens={old.max_tokens}"
            )
        self._adopt(grow_pools(self.arrays, new, -(-max(self.compressed, default=0) // old.page_size)))

    def reset(self) -> None:
        """Empties every row and forgets the statistics that were taken from its tokens."""
        self._count((0,) * self.rows, (0,) * self.rows)
        statistics = self.arrays.statistics
        if statistics is not None:
            for name, start in (("mean", 0), ("weight", 1), ("query_power", 0), ("query_count", 0), ("ready", False)):
                getattr(statistics, name).fill_(start)
            self._ready = False

    def state_dict(self) -> dict[str, Any]:
        """Every tensor by name, and the spec as text; the tensors are the cache's own, not copies."""
        return named_tensors(self.arrays)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a state into this cache.

        Args:
            state: As `state_dict` returns it.

        Raises:
            ValueError: For another spec, missing or unknown names, or wrong shapes, types or counters; the cache is
                then unchanged.
        """
        load_tensors(self.arrays, state)
        self._adopt(self.arrays)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file that `tq_jax.save_cache` writes; raises as that function does."""
        tq.save_cache(to_jax(jax.tree.map(lambda tensor: tensor.cpu(), self.arrays)), path)

    def _count(self, lengths: tuple[int, ...], compressed: tuple[int, ...]) -> None:
        """Writes the counters, on the host and in the cache."""
        self.lengths, self.compressed = lengths, compressed
        self.arrays.length.copy_(torch.tensor(lengths, dtype=torch.int32, device="cpu"))
        self.arrays.compressed.copy_(torch.tensor(compressed, dtype=torch.int32, device="cpu"))
