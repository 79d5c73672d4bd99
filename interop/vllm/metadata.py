"""The metadata of a step: the calls by which its queries attend, made once and shared by the layers."""

import dataclasses
import itertools
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    max_decode_query_len,
)

from interop.torch.paged_on_gpu import WRITES, write_size
from interop.torch.paged_rows import PagedRows
from interop.vllm.calls import RowBuffers, UniformCall, split_runs
from interop.vllm.chunks import Chunks, group_prompts, plan_earlier
from interop.vllm.dense_space import DenseSpace
from interop.vllm.report import logger, report
from interop.vllm.window import HotTables, WindowSpec, fill_slots, window_of
from interop.vllm.window_on_gpu import KernelTables
from pallas_kernels.attention import MAX_QUERY_TOKENS


@dataclasses.dataclass
class TurboQuantMetadata(AttentionMetadata):
    """The metadata of a step.

    Attributes:
        uniform: The calls of requests with few queries, over all of their tokens.
        prompts: The calls of the other requests.
        slots: int32, page slot of each token, padding included; negative for padding and behind it.
        count: Number of tokens, padding included.
        places: int64, place of each of the tokens of `slots` in the hot pools, negative for those that have none; None
            if there are no hot pools.
    """

    uniform: tuple[UniformCall, ...]
    prompts: tuple[Chunks, ...]
    slots: torch.Tensor
    count: int
    places: torch.Tensor | None = None


class TurboQuantBuilder(AttentionMetadataBuilder[TurboQuantMetadata]):
    """Makes the metadata of every step; when made itself, checks the configuration and logs the summary.

    A uniform step takes vLLM's own tensors of lengths and pages, at addresses that stay. The builder's own tensors stay
    where they are as well, and are filled by copies on the device: a CUDA graph of the layers replays with what the
    latest `build` has put there.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if kv_cache_spec.state_content_bytes is None:
            raise RuntimeError(
                f"this vLLM does not say how many bytes a token takes in {layer_names}: got {kv_cache_spec}"
            )
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        assert self.reorder_batch_threshold is not None
        self.reorder_batch_threshold = min(self.reorder_batch_threshold, MAX_QUERY_TOKENS)
        scheduler = vllm_config.scheduler_config
        self._rows = RowBuffers(scheduler.max_num_seqs)
        self._window = window_of(vllm_config, kv_cache_spec.block_size)
        shape = kv_cache_spec.num_kv_heads, kv_cache_spec.head_size
        self._space = DenseSpace.of(vllm_config, *shape, kv_cache_spec.dtype)
        self._hot: HotTables | None = None
        most = scheduler.max_num_batched_tokens + WRITES[-1]
        self._slots = torch.full((most,), -1, dtype=torch.int32, device=device)
        report(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs of uniform batches; only of single tokens if drafts have more tokens than the kernels take."""
        if max_decode_query_len(vllm_config) > MAX_QUERY_TOKENS:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return cls._cudagraph_support

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TurboQuantMetadata:
        """Plans the calls of a step. Nothing is read back from the device."""
        common = common_attn_metadata
        if not isinstance(common.causal, bool) or not common.causal:
            raise NotImplementedError(f"attention over compressed pages is causal, got causal={common.causal}")
        requests = common.num_reqs
        starts = common.query_start_loc_cpu[: requests + 1].tolist()
        rows = PagedRows(common.block_table_tensor[:requests], common.seq_lens[:requests])
        places = self._fill(rows, common.slot_mapping)
        assert self.reorder_batch_threshold is not None
        runs, first = split_runs(starts, self.reorder_batch_threshold)
        # Prompts first: rows with few queries stay in the tables, until the next step.
        prompts = self._prompts(common, rows, starts, first) if first < requests else ()
        few = self._read(rows.map(lambda x: x[:first])) if runs else rows
        return TurboQuantMetadata(
            uniform=tuple(UniformCall(run, self._rows.rows(run, few, first)) for run in runs),
            prompts=prompts,
            slots=self._slots[: _written(common.slot_mapping.shape[0])],
            count=common.slot_mapping.shape[0],
            places=places,
        )

    def cold_reads(self) -> int:
        """Tokens of windows and first tokens that had to be read from codes so far, per layer; waits for the device."""
        return 0 if self._hot is None else int(self._hot.cold_reads)

    def _tables(self, window: WindowSpec, rows: PagedRows) -> HotTables:
        """The tables; made by the first step, when the number of blocks is known."""
        cache, scheduler = self.vllm_config.cache_config, self.vllm_config.scheduler_config
        kind = KernelTables if self._slots.is_cuda else HotTables
        return kind(
            window,
            blocks=cache.num_gpu_blocks * (cache.block_size // window.block or 1),
            requests=scheduler.max_num_seqs,
            filled=self._slots,
            width=rows.table.shape[1],
        )

    def _read(self, rows: PagedRows) -> PagedRows:
        """Rows of all tokens as those of which some are read in full precision, if there is a window."""
        return rows if self._hot is None else self._hot.read(rows.table, rows.lengths)

    def _prompts(self, common: Any, rows: PagedRows, starts: list[int], first: int) -> tuple[Chunks, ...]:
        """The calls of the requests from one on, which are prompts."""
        own, bound = [end - start for start, end in itertools.pairwise(starts[first:])], common.seq_lens_cpu_upper_bound
        longest = [self._space.most] * len(own)
        totals = longest if bound is None else bound[first : first + len(own)].tolist()
        totals = [total if total > count else 0 for total, count in zip(totals, own, strict=True)]
        chunks = []
        for group in group_prompts(totals, most=self._space.most):
            begin, end = first + group.start, first + group.stop
            base, on_device = starts[begin], common.query_start_loc[begin : end + 1]
            on_device = on_device - base if base else on_device
            earlier = None
            if totals[group.start]:
                lengths = rows.lengths[begin:end] - (on_device[1:] - on_device[:-1])
                earlier = plan_earlier(
                    self._read(PagedRows(rows.table[begin:end], lengths)),
                    rows.table[begin:end],
                    on_device,
                    totals[group.start : group.stop],
                    tokens=starts[end] - base,
                    window=self._window,
                )
            chunks.append(Chunks(base, [start - base for start in starts[begin : end + 1]], on_device, earlier))
        return tuple(chunks)

    def _fill(self, rows: PagedRows, slots: torch.Tensor) -> torch.Tensor | None:
        """Fills the builder's slots with those of a step; returns the places of its tokens, if there is a window."""
        if self._window is None:
            fill_slots(self._slots, slots)
            return None
        self._hot = self._hot or self._tables(self._window, rows)
        places = self._hot.update(rows.table, rows.lengths, slots)
        if (cold := self._hot.news()) is not None:
            logger.info("tq_jax has read %d tokens of windows from codes so far, in each layer", cold)
        return places


def _written(count: int) -> int:
    """Tokens of the writes of a step of so many, padding included."""
    last = count - 1 - (count - 1) % WRITES[-1] if count else 0  # first token of the last write
    return last + write_size(count - last)
