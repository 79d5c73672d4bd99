"""Compressed pages in memory that someone else allocated, as a serving engine does: written and attended to in place.

A block of the engine is a page: one run of bytes that holds all arrays of the page, see `pallas_kernels.blocks`. The
engine can zero, copy and send it; kernels and reference read it as it is. A token is compressed when it is written.
Attention of the last tokens reads everything from the codes, the newest tokens too. For prompts, tokens become dense
again. On the CPU JAX computes and torch writes; on a GPU torch launches the kernels.
"""

import functools

import jax
import torch
from jaxtyping import Float, Int

import tq_jax as tq
from interop.torch import jax_calls
from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.blocks import TorchBlocks
from interop.torch.dlpack import to_jax, to_torch
from interop.torch.paged_on_gpu import PagedKernels
from interop.torch.paged_rows import HotPool, PagedRows
from pallas_kernels.blocks import Blocks
from pallas_kernels.numerics import power_of_two
from tq_jax.dense import dense_tokens
from tq_jax.paged import HotTokens, attend_paged


class PagedPool:
    """The compressed keys and values of one layer, for any number of sequences.

    Args:
        memory: As for `TorchBlocks`.
        key: Quantizer of keys, of JAX arrays.
        value: Quantizer of values.
        dtype: Type of the model's keys and values.
        statistics: float32 mean and weight of the keys, [h_kv, d] each, see `tq_jax.statistics`; None for keys that are
            stored as they are.
        hot: Tokens in full precision; None for a pool that all tokens are read from.

    Example:
        >>> quantizer = tq.make_quantizer(tq.QuantizerSpec(dim=64, bits=4))
        >>> pool = PagedPool(torch.zeros(3, 2, 32, 68, dtype=torch.uint8), quantizer, quantizer, torch.float32)
        >>> pool.write(torch.ones(40, 2, 64), torch.ones(40, 2, 64), torch.arange(32, 72))
        >>> rows = PagedRows(*(torch.tensor(x, dtype=torch.int32) for x in ([[1, 2]], [40])))
        >>> pool.attend(torch.ones(1, 1, 8, 64), rows).shape
        torch.Size([1, 1, 8, 64])
    """

    def __init__(
        self,
        memory: torch.Tensor,
        key: tq.Quantizer,
        value: tq.Quantizer,
        dtype: torch.dtype,
        statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
        hot: HotPool | None = None,
    ) -> None:
        self.hot = hot
        self._blocks = TorchBlocks(memory, key.spec, value.spec)
        self.pages = self._blocks.pages
        self.device, self.dtype = memory.device, dtype
        self.quantizers = key, value
        # Copies, because slices of a file's arrays start anywhere.
        self.statistics = None if statistics is None else tuple(x.to(self.device).float().clone() for x in statistics)
        self._expanded: dict[int, tuple[torch.Tensor, ...]] = {}

    @functools.cached_property
    def _jax_pages(self) -> Blocks:
        """The pages as JAX sees them on the CPU, current after every write of torch."""
        return self._blocks.as_jax()

    def _jax_hot(self, rows: PagedRows) -> HotTokens | None:
        """The tokens in full precision of sequences, as JAX sees them on the CPU."""
        if rows.exact is None:
            return None
        assert self.hot is not None
        slots, begin, packed = to_jax(rows.exact.tensors)
        return HotTokens(*self._hot_arrays, slots, begin, packed, self.hot.first)

    @functools.cached_property
    def _hot_arrays(self) -> tuple[jax.Array, jax.Array]:
        assert self.hot is not None
        return to_jax((self.hot.keys, self.hot.values))

    @functools.cached_property
    def _kernels(self) -> PagedKernels:
        return PagedKernels(self._blocks.rows(), *self.quantizers, self.dtype, self.hot)

    def write(
        self,
        keys: Float[torch.Tensor, "n h_kv d"],
        values: Float[torch.Tensor, "n h_kv d"],
        slots: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> None:
        """Compresses tokens into their places, and copies some to the hot pool.

        Args:
            keys: After rotary embedding.
            values: Values.
            slots: Integers [n or more], page * page_size + place; a negative one skips its token, and all behind the
                tokens are negative.
            places: int64 [n], place of each token that has a slot in the hot pool, slot * page_size + place; -1 for
                tokens without one. By default no token has one.
        """
        keys, values = keys.detach(), values.detach()
        if self.device.type == "cuda":
            self._kernels.write(keys, values, slots, self.statistics, places)
            return
        if places is not None:
            assert self.hot is not None
            for pool, tokens in ((self.hot.keys, keys), (self.hot.values, values)):
                pool[places] = tokens.to(pool.dtype)
        for start in range(0, len(keys), jax_calls.LARGEST_BATCH):
            part = slice(start, min(start + jax_calls.LARGEST_BATCH, len(keys)))
            self._write(keys[part], values[part], slots[part])

    def _write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        known = slots >= 0
        if not bool(known.all()):
            keys, values, slots = keys[known], values[known], slots[known]
        if not len(slots):
            return
        keys, values = keys.float(), values.float()
        if self.statistics is not None:
            keys = (keys - self.statistics[0]) * self.statistics[1]
        codes = jax_calls.encode_tokens(*self.quantizers, keys, values)
        page_size = self.pages.page_size
        slots = slots.long()
        page, place = slots // page_size, slots % page_size
        jax_calls.write_codes(self.pages.keys, codes[0], page, place, channel_major=False)
        jax_calls.write_codes(self.pages.values, codes[1], page, place, channel_major=True)

    def attend(
        self,
        query: Float[torch.Tensor, "b t h_q d"],
        rows: PagedRows,
        options: AttendOptions = AttendOptions(),  # noqa: B008
        sink_logits: Float[torch.Tensor, "h_q"] | None = None,
        *,
        out: Float[torch.Tensor, "b t h_q d"] | None = None,
    ) -> Float[torch.Tensor, "b t h_q d"]:
        """Causal attention of the last tokens of sequences, which `write` has written, over their pages.

        Args:
            query: After rotary embedding; of the last t tokens of each sequence.
            rows: The sequences.
            options: Of the logits; `precise` is of the kernels for few queries, that for more always is.
            sink_logits: float32, a learned logit per head that takes part in the softmax and has no value.
            out: Takes the outputs; by default a new tensor.

        Returns:
            Outputs, zero for queries that see no token.

        Raises:
            NotImplementedError: On a GPU, for shapes or formats outside the kernels' limits.
        """
        statistics = None if self.statistics is None else self._statistics(query.shape[0])
        if self.device.type == "cuda":
            return self._kernels.attend(query, rows, options, statistics, sink_logits, out)
        sinks = None if sink_logits is None else jax_calls.fresh(sink_logits)
        counts = torch.full_like(rows.lengths, query.shape[1])
        arrays = to_jax((jax_calls.fresh(query.detach()), rows.table, rows.lengths, counts, statistics, sinks))
        found = to_torch(
            attend_paged(
                arrays[0],
                self._jax_pages,
                self.quantizers,
                *arrays[1:4],
                options=options.for_head_dim(query.shape[-1]),
                statistics=arrays[4],
                sink_logits=arrays[5],
                hot=self._jax_hot(rows),
            )
        )
        return found if out is None else out.copy_(found)

    def prepare_writes(self, keys: Float[torch.Tensor, "n h_kv d"], values: Float[torch.Tensor, "n h_kv d"]) -> None:
        """On a GPU, starts to compile the kernels that `write` takes, so that the first long prompt waits less.

        Args:
            keys: As for `write`, of any number of tokens.
            values: As for `write`, of any number of tokens.
        """
        if self.device.type == "cuda":
            self._kernels.prepare_writes(keys, values, centred=self.statistics is not None)

    def prepare_attend(
        self,
        most: int,
        query: Float[torch.Tensor, "b t h_q d"],
        rows: PagedRows,
        options: AttendOptions,
        sink_logits: Float[torch.Tensor, "h_q"] | None = None,
    ) -> None:
        """On a GPU, starts to compile the kernels of `attend` for batches of all powers of two up to one.

        Args:
            most: The largest batch, not a power of two itself if need be.
            query: As for `attend`, of any number of sequences.
            rows: As for `attend`, of any number of sequences.
            options: As for `attend`.
            sink_logits: As for `attend`.
        """
        if self.device.type == "cuda":
            batches = [1 << i for i in range((most - 1).bit_length() + 1)]
            centred = self.statistics is not None
            self._kernels.prepare_attend(batches, query, rows, options, sink_logits, centred=centred)

    def dequantize(
        self,
        rows: PagedRows,
        starts: Int[torch.Tensor, "b"],
        heads: Int[torch.Tensor, "h"],
        out: tuple[Float[torch.Tensor, "tokens h d"], Float[torch.Tensor, "tokens h d"]],
    ) -> None:
        """Writes tokens of sequences as dense keys and values, as the model had them before they were compressed.

        Args:
            rows: The sequences; all tokens are read from pages.
            starts: int32, place of the first token of each sequence in the result.
            heads: int32, KV heads that are wanted.
            out: Take keys and values; places of no token become arbitrary.

        Raises:
            NotImplementedError: On a GPU, for shapes or formats outside the kernel's limits.
        """
        statistics = None if self.statistics is None else self._statistics(rows.lengths.shape[0])
        if self.device.type == "cuda":
            self._kernels.dequantize(rows, starts, heads, statistics, out)
            return
        count = int((starts + rows.lengths).max())
        arrays = to_jax((rows.table, rows.lengths, starts, heads, statistics))
        found = dense_tokens(
            self._jax_pages,
            self.quantizers,
            *arrays[:4],
            tokens=power_of_two(count),  # few sizes, so that few functions are compiled
            dtype="float32",
            statistics=arrays[4],
            implementation="reference",
        )
        for tensor, tokens in zip(out, to_torch(found), strict=True):
            tensor[:count] = tokens[:count].to(tensor.dtype)

    def _statistics(self, count: int) -> tuple[torch.Tensor, ...]:
        """Mean and weight for each of a number of sequences, which are few numbers."""
        assert self.statistics is not None
        if count not in self._expanded:
            self._expanded[count] = tuple(x.expand(count, *x.shape).contiguous() for x in self.statistics)
        return self._expanded[count]
