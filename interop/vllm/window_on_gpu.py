"""The tables of `interop.vllm.window` on a GPU, changed and read by a few launches of our kernels."""

import dataclasses
from typing import Any

import torch
from jaxtyping import Int

from interop.launcher.program import POINTER_ALIGNMENT, Bound, BoundProgram, FirstPart
from interop.torch.paged_rows import PagedRows
from interop.vllm.window import HotTables, WindowSpec
from pallas_kernels.append.hot_blocks_triton import HotBlocks, HotPlan, Requests, read_hot_blocks, update_hot_blocks

MOST_STEPS = 1 << 30
"""Steps after which the age of slots is forgotten: the kernels count steps in 31 bits."""


class KernelTables(HotTables):
    """Tables like `HotTables`, on a GPU.

    A step is one program of three launches whatever it holds, so that nothing is compiled once the first step has run.

    Args:
        spec: As for `HotTables`, as are the other arguments.
    """

    _type = torch.int32

    def __init__(self, spec: WindowSpec, *, blocks: int, requests: int, filled: torch.Tensor, width: int) -> None:
        super().__init__(spec, blocks=blocks, requests=requests, filled=filled, width=width)
        plan = HotPlan(spec.window, spec.sinks, spec.block, spec.first, spec.entries)
        self._rows, self._known = len(self._lengths), -1
        self._bound: dict[str, Bound] = {}

        def zeros(*shape: int) -> torch.Tensor:
            return filled.new_zeros(shape, dtype=torch.int32)

        self._counts = filled.new_zeros(1, dtype=torch.int64)
        self._clock = zeros(2)
        tables = HotBlocks(
            counts=_halves(self._counts)[0],
            clock=self._clock,
            hot=self._hot,
            begun=self._begun,
            owner=self._owner,
            used=self._used,
            order=zeros(self._slots),
            wanted=zeros(self._rows * plan.padded),
            slots=filled,
            places=_halves(self._places),
            table=self._table,
            lengths=self._lengths,
            exact=self._exact.slots,
            begin=self._exact.begin,
            packed=self._exact.packed,
            cold=_halves(self._cold),
        )
        functions = {"update": _Update(plan), "read": _Read(plan)}
        self._programs = {name: BoundProgram(function, tables) for name, function in functions.items()}
        table, lengths = (FirstPart(x, self._rows) for x in (self._table, self._lengths))
        self._programs["update"].prepare(table, lengths, FirstPart(_halves(self._places), len(filled)))
        self._programs["read"].prepare(table, lengths)

    def update(
        self, table: Int[torch.Tensor, "b n"], lengths: Int[torch.Tensor, "b"], slots: Int[torch.Tensor, "t"]
    ) -> Int[torch.Tensor, "t"]:
        """As `HotTables.update`."""
        self._step += 1
        if self._step % MOST_STEPS == 0:
            for x in (self._used, self._begun, self._clock):
                x.zero_()
        self._launch("update", table, lengths, slots)
        return self._places[: slots.shape[0]]

    def read(self, table: Int[torch.Tensor, "b n"], lengths: Int[torch.Tensor, "b"]) -> PagedRows:
        """As `HotTables.read`."""
        self._launch("read", table, lengths)
        return self._rows_of(lengths)

    def _launch(self, name: str, table: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor | None = None) -> None:
        """Launches a program; one more launch says how many tokens and requests there are, if that is news."""
        tokens = self._known & 0xFFFFFFFF if slots is None else slots.shape[0]
        if (counts := lengths.shape[0] << 32 | tokens) != self._known:
            self._counts.fill_(counts)
            self._known = counts
        given = [_aligned(x) for x in (table, lengths, *(() if slots is None else (_halves(slots.long()),)))]
        if name not in self._bound:
            sizes = (self._rows, self._rows, len(self._filled))
            parts = [FirstPart(x, size) for x, size in zip(given, sizes, strict=False)]
            self._bound[name] = self._programs[name].bound(*parts)
        self._bound[name](given)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy without gaps at an address that kernels assume."""
    return (
        x
        if x.is_contiguous() and x.data_ptr() % POINTER_ALIGNMENT == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


def _halves(x: torch.Tensor) -> torch.Tensor:
    """An int64 vector [n] as int32 [n, 2], the lower halves first: the kernels have no int64."""
    return x.view(torch.int32).view(-1, 2)


@dataclasses.dataclass(frozen=True)
class _Update:
    """`update_hot_blocks` with its plan bound; equal for equal plans."""

    plan: HotPlan

    def __call__(self, tables: HotBlocks, table: Any, lengths: Any, slots: Any) -> HotBlocks:
        return update_hot_blocks(Requests(table, lengths, slots), tables, self.plan)


@dataclasses.dataclass(frozen=True)
class _Read:
    """`read_hot_blocks` with its plan bound; equal for equal plans."""

    plan: HotPlan

    def __call__(self, tables: HotBlocks, table: Any, lengths: Any) -> HotBlocks:
        return read_hot_blocks(Requests(table, lengths), tables, self.plan)
