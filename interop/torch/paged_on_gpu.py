"""Pages of a serving engine on a GPU: encoded into and attended to by kernels that torch launches.

Everything is a launch on torch's current stream with addresses that torch knows, so that a CUDA graph can capture it
once the same shapes have run before.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Float, Int

import tq_jax as tq
from interop.launcher.function import TorchFunction
from interop.launcher.program import POINTER_ALIGNMENT, Argument, BoundProgram, FirstPart, StridedRows
from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.paged_dense import DenseKernels
from interop.torch.paged_rows import HotPool, PagedRows
from pallas_kernels.attention import (
    MAX_QUERY_TOKENS,
    AttendPlan,
    FullPrecisionBlocks,
    PagedArrays,
    attend_block_table,
)
from pallas_kernels.blocks import PageRows
from pallas_kernels.encode import launch_triton as encode
from pallas_kernels.encode.arguments import EncodeArguments, ExactTokens
from pallas_kernels.pytree import pytree
from tq_jax.attention import attend_plan, basis_of
from tq_jax.quantizer import encoder

WRITES = (16, 256, 1024, 4096)
"""Tokens per launch that writes, padding included: a kernel takes longer to compile than any padding costs."""


class PagedKernels:
    """The kernels of one layer.

    Args:
        pages: The pages, of rows that kernels take.
        key: Quantizer of keys, of JAX arrays.
        value: Quantizer of values.
        dtype: Type of the model's keys and values.
        hot: Tokens in full precision; None if there are none.
    """

    def __init__(
        self, pages: PageRows, key: tq.Quantizer, value: tq.Quantizer, dtype: torch.dtype, hot: HotPool | None = None
    ) -> None:
        self._specs, self._dtype = (key.spec, value.spec), dtype
        device: Any = jax.tree.leaves(pages)[0].device

        def tensor(leaf: Any) -> torch.Tensor | StridedRows:
            return leaf if isinstance(leaf, torch.Tensor | StridedRows) else torch.from_numpy(np.array(leaf)).to(device)

        exact, self._first = (None, None), hot is not None and hot.first
        if hot is not None:
            exact = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x for x in (hot.keys, hot.values))
        arrays = PagedArrays(pages, basis_of(key), basis_of(value), key.sketch, *exact)
        self._arrays = jax.tree.map(tensor, arrays)
        self._make_dense = functools.partial(DenseKernels, pages, key, value, tensor)
        copied = (None, None) if hot is None else (hot.keys, hot.values)
        self._encode = BoundProgram(PagedEncode(key, value), EncodePools(pages, *copied))
        self._first_row = torch.zeros(WRITES[-1], dtype=torch.int32, device=device)
        self._copies = hot is not None
        self._nowhere = torch.full((WRITES[-1] if self._copies else 0,), -1, dtype=torch.int64, device=device)
        self._programs: dict[Any, BoundProgram] = {}

    def write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        statistics: tuple[torch.Tensor, ...] | None,
        places: torch.Tensor | None = None,
    ) -> None:
        """Writes n tokens to their slots; arguments as of `PagedPool`."""
        for start in range(0, len(keys), WRITES[-1]):
            part = slice(start, start + WRITES[-1])
            copies = None if places is None else places[part]
            self._write(keys[part], values[part], slots[start:], statistics, copies)

    def prepare_writes(self, keys: torch.Tensor, values: torch.Tensor, *, centred: bool) -> None:
        """Starts to compile the kernels that write any number of tokens.

        Args:
            keys: As for `write`, of any number of tokens.
            values: As for `write`, of any number of tokens.
            centred: Whether keys have statistics.
        """
        heads, dim = self._arrays.pages.kv_heads, self._specs[0].dim
        statistics = [_meta((1, heads, dim), torch.float32)] * 2
        for size in WRITES:
            tokens = (_meta(_rows_of(x.to(self._dtype), size).shape, self._dtype) for x in (keys, values))
            given = (*statistics, _meta((size,), torch.int32)) if centred else (None,) * 3
            places = _meta((size, 1, 2), torch.int32) if self._copies else None
            self._encode.prepare(*tokens, _meta((size, 1), torch.int32), *given, places)

    def prepare_attend(
        self,
        batches: Sequence[int],
        query: torch.Tensor,
        rows: PagedRows,
        options: AttendOptions,
        sink_logits: torch.Tensor | None,
        *,
        centred: bool,
    ) -> None:
        """Starts to compile the kernels of `attend` for batches of other sizes.

        Args:
            batches: Numbers of sequences.
            query: As for `attend`, of any number of sequences.
            rows: As for `attend`, of any number of sequences.
            options: As for `attend`.
            sink_logits: As for `attend`.
            centred: Whether keys have statistics.
        """
        heads, dim = self._arrays.pages.kv_heads, query.shape[3]
        program = self._program(query.shape[1], options)
        for batch in batches:
            statistics = [_meta((batch, heads, dim), torch.float32) if centred else None] * 2
            table, lengths, *exact = (_meta((batch, *x.shape[1:]), torch.int32) for x in rows.tensors)
            asked = _meta((batch, *query.shape[1:]), query.dtype)
            program.prepare(asked, table, lengths, *statistics, sink_logits, *exact)

    def _write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        statistics: tuple[torch.Tensor, ...] | None,
        places: torch.Tensor | None,
    ) -> None:
        size = write_size(len(keys))
        slots = slots[:size].int()
        if len(slots) < size:
            slots = torch.nn.functional.pad(slots, (0, size - len(slots)), value=-1)
        # The kernel reads a token if its slot is not negative.
        tokens = [_rows_of(x.to(self._dtype), size) for x in (keys, values)]
        copies = None
        if self._copies:
            absent = self._nowhere[: len(keys)] if places is None else places
            copies = FirstPart(absent.view(torch.int32).view(-1, 1, 2), size)
        given = (None,) * 3
        if statistics is not None:
            given = (*(x[None] for x in statistics), self._first_row[:size])
        self._encode(*tokens, slots[:, None], *given, copies)

    def attend(
        self,
        query: torch.Tensor,
        rows: PagedRows,
        options: AttendOptions,
        statistics: tuple[torch.Tensor, ...] | None,
        sink_logits: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Outputs of queries [b, t, h_q, d]; arguments as of `PagedPool.attend`, the statistics' [b, h_kv, d]."""
        program = self._program(query.shape[1], options)
        table, lengths, *exact = rows.tensors
        given = (None, None) if statistics is None else statistics
        outputs = () if out is None else (out,)
        return program(query.contiguous(), table, lengths, *given, sink_logits, *exact, out=outputs)[0]

    @functools.cached_property
    def _dense(self) -> DenseKernels:
        return self._make_dense()

    def dequantize(
        self,
        rows: PagedRows,
        starts: torch.Tensor,
        heads: torch.Tensor,
        statistics: tuple[torch.Tensor, ...] | None,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Writes dense tokens; arguments as of `PagedPool.dequantize`, the statistics' [b, h_kv, d]."""
        self._dense(rows.table, rows.lengths, starts, heads, statistics, out)

    def _program(self, count: int, options: AttendOptions) -> BoundProgram:
        """The program of a number of queries per sequence."""
        key = options, count > MAX_QUERY_TOKENS
        if key not in self._programs:
            runner = TorchFunction if count > MAX_QUERY_TOKENS else None
            function = PagedAttend(*self._specs, options, first=self._first)
            self._programs[key] = BoundProgram(function, self._arrays, kind=runner)
        return self._programs[key]


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def write_size(count: int) -> int:
    """Tokens of the launch that writes a number of tokens, of which there are at most `WRITES[-1]`."""
    return next(size for size in WRITES if size >= count)


def _rows_of(x: torch.Tensor, size: int) -> Argument:
    """Tokens [n, h_kv, d] as an array [size, 1, heads, d], of which the first n tokens and h_kv heads are theirs.

    Heads of a joint product lie side by side: its rows are those of an array with more heads.
    """
    heads, dim = x.shape[1:]
    distance = x.stride(0)
    aligned = x.data_ptr() % POINTER_ALIGNMENT == 0
    if not aligned or x.stride()[1:] != (dim, 1) or distance % dim or distance < heads * dim:
        x, distance = x.clone(memory_format=torch.contiguous_format), heads * dim
    return StridedRows(x[:, None], (size, 1, distance // dim, dim))


@pytree
class EncodePools:
    """What `PagedEncode` writes to; a pytree.

    Attributes:
        pages: The pages.
        exact_keys: Keys in full precision, [tokens, h_kv, d]; None if there are none.
        exact_values: Values in full precision.
    """

    pages: Any
    exact_keys: Any
    exact_values: Any


class PagedEncode:
    """The encode kernels with their quantizers bound; equal for equal ones."""

    def __init__(self, key: tq.Quantizer, value: tq.Quantizer) -> None:
        self._encoders = encoder(key), encoder(value)
        leaves, structure = jax.tree.flatten(self._encoders)
        self._identity = structure, tuple(np.asarray(leaf).tobytes() for leaf in leaves)

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PagedEncode) and other._identity == self._identity

    def __call__(
        self, pools: EncodePools, keys: Any, values: Any, slots: Any, mean: Any, weight: Any, rows: Any, places: Any
    ) -> EncodePools:
        """The pools with tokens [n, 1, h_kv, d] in them, centred and weighted by the statistics of their rows."""
        key, value = self._encoders
        tokens = EncodeArguments(keys, values, slots, key=key, value=value, mean=mean, weight=weight, rows=rows)
        exact = None if places is None else ExactTokens(pools.exact_keys, pools.exact_values, places)
        pages, exact = encode.encode_and_copy(tokens, pools.pages, exact, interpret=False)
        return (
            dataclasses.replace(pools, pages=pages) if exact is None else EncodePools(pages, exact.keys, exact.values)
        )


@dataclasses.dataclass(frozen=True)
class PagedAttend:
    """Attention of the last tokens of sequences over the pages of a block table, with its static options bound.

    Attributes:
        key: Quantizer of keys.
        value: Quantizer of values.
        options: Of the attention.
        first: Whether first blocks of sequences may be read in full precision.
        interpret: Whether the kernels run as jnp.
    """

    key: tq.QuantizerSpec
    value: tq.QuantizerSpec
    options: AttendOptions
    first: bool = False
    interpret: bool = False

    def _plan(self, arrays: PagedArrays, dim: int, pages: int) -> AttendPlan:
        """The plan of a cache whose tokens are all in pages, for a number of pages per sequence."""
        heads, size = arrays.pages.kv_heads, arrays.pages.page_size
        spec = tq.CacheSpec(heads, dim, pages * size, self.key, self.value, window=0, sink_tokens=0, page_size=size)
        options = self.options
        plan = attend_plan(spec, options.for_head_dim(dim), precise=options.precise, interpret=self.interpret)
        return dataclasses.replace(plan, sink_slots=size if self.first else 0)

    def __call__(
        self,
        arrays: PagedArrays,
        query: Float[Any, "b t h_q d"],
        table: Int[Any, "b n"],
        lengths: Int[Any, "b"],
        mean: Float[Any, "b h_kv d"] | None,
        weight: Float[Any, "b h_kv d"] | None,
        sink_logits: Any,
        *exact: Any,
    ) -> tuple[Any]:
        """The outputs, see `PagedPool.attend`; `exact` are the tensors of `ExactRows`, if there are any."""
        plan = self._plan(arrays, query.shape[-1], table.shape[1])
        return (
            attend_block_table(
                query,
                arrays,
                table,
                lengths,
                plan,
                statistics=None if mean is None or weight is None else (mean, weight),
                segment=FullPrecisionBlocks(*exact) if exact else None,
                sink_logits=sink_logits,
            ),
        )
