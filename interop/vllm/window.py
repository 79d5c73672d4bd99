"""The latest and the first tokens of requests in full precision: which blocks have a place for them.

Codes of every token are written on arrival. Beside the pages, every layer has a hot pool: slots of one block each, in
the model's type. The tables here, shared by the layers of a KV-cache group, say which blocks have a slot. They live on
the device and change once per step, by a few operations on vectors that wait for nothing.

A block gets a slot in the step that writes its first token, if it then holds one of the latest or of the first tokens
of its request. From then on, every token that is written to the block is written to its slot as well. So a block that
has a slot has all of its tokens there: a slot needs no more than the name of its block to be valid. This holds when the
block goes to another request, because vLLM writes a block from its first token on, and when drafts are rolled back,
because tokens are written again before they are read. Blocks that are shared, by prefixes, samples or beams, share a
slot. Slots are taken back only if none is free: first from the block that a scheduled request needed the longest ago.

A request reads its longest run of blocks with slots at its end, back to the block of its first token in the window,
and its first block if that has a slot. All else is read from codes. So an answer depends on which blocks have slots:
after a prefix hit or a preemption, some may have lost theirs. Tokens that are then read from codes are counted.
"""

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Int

from interop.torch.paged_rows import ExactRows, HotPool, PagedRows
from interop.vllm.options import Options
from pallas_kernels.numerics import power_of_two

NEWS = 4096
"""Steps between two looks at the number of cold reads."""


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """How much of a request is read in full precision.

    Attributes:
        window: Latest tokens; 0 for none.
        sinks: First tokens, at most a block; 0 for none.
        block: Tokens per block.

    Raises:
        ValueError: For more first tokens than a block has.

    Example:
        >>> spec = WindowSpec(window=128, sinks=4, block=32)
        >>> spec.tail, spec.entries, spec.tokens(8)
        (5, 6, 1568)
    """

    window: int
    sinks: int
    block: int

    def __post_init__(self) -> None:
        if self.sinks > self.block:
            raise ValueError(f"expected sinks of at most a block, {self.block} tokens, got sinks={self.sinks}")

    @classmethod
    def of(cls, options: Options, block: int) -> "WindowSpec | None":
        """The window of options; None if they ask for none."""
        return cls(options.window, options.sinks, block) if options.window or options.sinks else None

    @property
    def tail(self) -> int:
        """Most blocks that hold tokens of the window."""
        return -(-self.window // self.block) + 1 if self.window else 0

    @property
    def first(self) -> int:
        """Blocks for the first tokens."""
        return 1 if self.sinks else 0

    @property
    def entries(self) -> int:
        """Most blocks of a request that are read in full precision."""
        return self.first + self.tail

    def tokens(self, requests: int) -> int:
        """Tokens of a hot pool for a number of requests, and a block that is never read."""
        return (requests * self.entries + 1) * self.block


class HotTables:
    """Which blocks have slots of the hot pools, for the layers of a KV-cache group.

    What steps write here stays at its address, for CUDA graphs. `interop.vllm.window_on_gpu` has kernels that do the
    same in a few launches.

    Args:
        spec: The window.
        blocks: Blocks of the KV cache. Block 0 belongs to no request and never has a slot.
        requests: Most requests of a step; those that run have slots enough.
        filled: int32 [tokens], takes the page slots of each step's tokens; of the most tokens, padding included.
        width: Columns of block tables.
    """

    _type = torch.int64  # of the tables

    def __init__(self, spec: WindowSpec, *, blocks: int, requests: int, filled: torch.Tensor, width: int) -> None:
        self._spec, self._blocks, self._slots, device = spec, blocks, requests * spec.entries, filled.device
        self._step = self._said = 0
        self._copied = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        # The last element of each table stands for no block and for no slot.
        self._hot, self._begun = full(-1, blocks + 1, dtype=self._type), full(0, blocks + 1, dtype=self._type)
        self._owner = full(blocks, self._slots + 1, dtype=self._type)
        self._used = full(0, self._slots + 1, dtype=self._type)
        rows, self._filled = power_of_two(requests), filled
        self._cold, self._places = full(0, rows, dtype=torch.int64), full(-1, len(filled), dtype=torch.int64)
        self._table, self._lengths = full(0, rows, width), full(0, rows)
        self._exact = ExactRows(full(0, rows, spec.entries), full(0, rows), full(0, rows))
        self._views: dict[int, PagedRows] = {}
        self._entry = torch.arange(spec.tail, device=device)
        # Number of each entry's block in its request: that of the window's first block times one, plus another number.
        self._moves = torch.tensor([0] * spec.first + [1] * spec.tail, device=device)
        self._offset = torch.tensor([0] * spec.first + list(range(spec.tail)), device=device)

    @property
    def cold_reads(self) -> torch.Tensor:
        """int64 on the device: tokens of windows and first tokens that were read from codes so far, per layer."""
        return self._cold.sum()

    def news(self) -> int | None:
        """Cold reads up to an earlier step, once in `NEWS` steps and if they have grown; waits for nothing."""
        if self._step % NEWS:
            return None
        known, before = int(self._copied), self._said
        self._copied.copy_(self.cold_reads, non_blocking=True)
        self._said = known
        return known if known > before else None

    def update(
        self, table: Int[torch.Tensor, "b n"], lengths: Int[torch.Tensor, "b"], slots: Int[torch.Tensor, "t"]
    ) -> Int[torch.Tensor, "t"]:
        """Gives slots to blocks that a step begins; `filled` takes the slots of its tokens, as `fill_slots` does.

        Args:
            table: int32, blocks of each request.
            lengths: int32, tokens of each request once the step is written; 0 for padding.
            slots: int64, page slot of each token of the step, block * tokens per block + place; negative for padding.

        Returns:
            int64, place of each token of the step in the hot pools, slot * tokens per block + place; -1 for tokens of
            blocks without a slot. Later calls overwrite it.
        """
        self._step += 1
        fill_slots(self._filled, slots)
        size = self._spec.block
        place = slots % size
        block = torch.where(slots >= 0, slots // size, self._blocks)
        self._begun.index_fill_(0, torch.where(place == 0, block, self._blocks), self._step)
        index, blocks = self._window_blocks(table, lengths)
        slot = self._hot[blocks]
        self._used.index_fill_(0, torch.where(slot >= 0, slot, self._slots).flatten(), self._step)
        wanted = (slot < 0) & (blocks < self._blocks) & (self._begun[blocks] == self._step)
        if self._spec.first and self._spec.tail:
            wanted[:, 1:] &= index[:, 1:] > 0  # the first block once
        self._give(blocks.flatten(), wanted.flatten())
        hot, places = self._hot[block], self._places[: len(slots)]
        return places.copy_(torch.where(hot >= 0, hot * size + place, -1))

    def _give(self, block: torch.Tensor, wanted: torch.Tensor) -> None:
        """Gives slots to the blocks that are wanted, the oldest ones first; none that this step marked."""
        rank = wanted.cumsum(0) - 1
        oldest = torch.argsort(self._used[:-1], stable=True)
        slot = oldest[rank.clamp(0, self._slots - 1)]
        given = wanted & (rank < self._slots) & (self._used[slot] < self._step)
        slot, block = torch.where(given, slot, self._slots), torch.where(given, block, self._blocks)
        # A block that two requests wanted has the slot that it got last.
        old = self._owner[slot]
        self._hot.index_fill_(0, torch.where(self._hot[old] == slot, old, self._blocks), -1)
        self._hot.scatter_(0, block, slot)
        self._hot[-1:].fill_(-1)
        self._owner.scatter_(0, slot, block)
        self._used.index_fill_(0, slot, self._step)

    def _window_blocks(self, table: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Number in its request and name of each block that a request reads in full precision, int64 [b, entries].

        The block of the first tokens comes first; the name is that of no block where a request has none.
        """
        lengths = lengths.long()
        begin = (lengths - self._spec.window).clamp(min=0) // self._spec.block
        index = begin[:, None] * self._moves + self._offset
        there = index * self._spec.block < lengths[:, None]
        names = table.gather(1, index.clamp(max=table.shape[1] - 1)).long()
        return index, torch.where(there & (names > 0), names, self._blocks)

    def read(self, table: Int[torch.Tensor, "b n"], lengths: Int[torch.Tensor, "b"]) -> PagedRows:
        """What requests read from codes and what from the hot pools, after `update`.

        Args:
            table: int32, blocks of each request.
            lengths: int32, tokens of each request; 0 for padding.

        Returns:
            The rows, padded to a power of two. Later calls overwrite their tensors, but not lengths that were given for
            a power of two.
        """
        spec, count = self._spec, len(lengths)
        index, blocks = self._window_blocks(table, lengths)
        slot = self._hot[blocks]
        stop = whole = lengths.long()
        slots, begin, packed = (x[:count] for x in self._exact.tensors)
        if spec.tail:
            tail, entry = slot[:, spec.first :], self._entry
            there = index[:, spec.first :] * spec.block < whole[:, None]
            cold = (((tail < 0) & there) * (entry + 1)).amax(1)  # entries up to the last one without a slot
            stop = torch.minimum((index[:, spec.first] + cold) * spec.block, whole)
            shifted = tail.gather(1, (entry + cold[:, None]).clamp(max=spec.tail - 1))
            slots[:, spec.first :] = shifted.clamp(min=0)
        codes = self._table[:count]
        codes.copy_(table)
        if spec.first:
            exact = (slot[:, 0] >= 0) & (stop >= spec.block)
            begin.copy_(exact * spec.block)
            slots[:, 0] = slot[:, 0].clamp(min=0)
            torch.where(exact[:, None], table[:, 1:], table[:, :-1], out=codes[:, :-1])
        packed.copy_(stop - begin)
        latest = (whole - spec.window).clamp(min=0)
        cold = (stop - torch.maximum(latest, begin)).clamp(min=0)
        cold += (torch.minimum(stop, latest).clamp(max=spec.sinks) - begin).clamp(min=0)
        self._cold[:count] += cold
        self._lengths[:count].copy_(lengths)
        for padded in (self._lengths, *self._exact.tensors[1:]):
            padded[count : power_of_two(count)].zero_()
        return self._rows_of(lengths)

    def _rows_of(self, lengths: torch.Tensor) -> PagedRows:
        """The rows that were read last, of so many lengths."""
        count = lengths.shape[0]
        size = power_of_two(count)
        if size not in self._views:
            self._views[size] = PagedRows(self._table, self._lengths, self._exact).map(lambda x: x[:size])
        rows = self._views[size]
        return rows if size > count else PagedRows(rows.table, lengths, rows.exact)


def fill_slots(filled: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes the slots of a step to a longer tensor, and negative ones behind them as writes need them."""
    filled[: len(slots)].copy_(slots)
    filled[len(slots) :].fill_(-1)


def why_off(vllm_config: Any) -> str | None:
    """Why tokens are not kept in full precision, whatever the options say; None if they are.

    A slot is valid because every token of its block was written by a step that its tables know.
    """
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        return "a KV connector writes blocks that no step writes"
    if getattr(vllm_config.parallel_config, "use_ubatching", False):
        return "halves of a batch run side by side"
    unit = getattr(vllm_config.cache_config, "hash_block_size", None)
    if unit is not None and unit != vllm_config.cache_config.block_size:
        return f"prefixes of {unit} tokens are shared, so that vLLM copies blocks that no step writes"
    return None


def window_of(vllm_config: Any, block: int) -> WindowSpec | None:
    """The window of an engine with blocks of so many tokens; None if it has none."""
    options = Options.from_config(vllm_config.additional_config)
    return None if why_off(vllm_config) else WindowSpec.of(options, block)


def reserve(
    pool: HotPool | None, spec: WindowSpec, *, requests: int, shape: tuple[int, int], like: torch.Tensor
) -> HotPool:
    """A hot pool for a number of requests: the given one if it is large enough, else a new one.

    Args:
        pool: The pool so far.
        spec: The window.
        requests: Most requests that run at a time.
        shape: KV heads and channels.
        like: A tensor of the device and type of keys and values.

    Raises:
        ValueError: If a GPU has too little free memory.
    """
    tokens = spec.tokens(requests)
    if pool is not None and len(pool.keys) >= tokens:
        return pool
    needed = 2 * tokens * math.prod(shape) * like.element_size()
    if like.device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(like.device)[0]):
        raise ValueError(
            f"expected {free} bytes of free memory to hold {tokens} tokens of a layer in full precision, got {needed}: "
            f"take a smaller max_num_seqs ({requests}) or window ({spec.window}, in blocks of {spec.block})"
        )
    with torch.inference_mode(False):
        keys, values = (torch.zeros(tokens, *shape, dtype=like.dtype, device=like.device) for _ in range(2))
    return HotPool(keys, values, bool(spec.first))
