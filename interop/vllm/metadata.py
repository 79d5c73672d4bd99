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
from interop.vllm.calls import RowBuffers, UniformCall, plan_earlier, split_runs
from interop.vllm.prompts import Prompts
from interop.vllm.report import logger, report
from interop.vllm.window import HotTables, WindowSpec, fill_slots, window_of
from interop.vllm.window_on_gpu import KernelTables
from pallas_kernels.attention import MAX_QUERY_TOKENS


@dataclasses.dataclass
class TurboQuantMetadata(AttentionMetadata):
    """The metadata of a step.

    Attributes:
        uniform: The calls of requests with few queries, over all of their tokens.
        prompts: The other requests; None if there are none.
        slots: int32, page slot of each token, padding included; negative for padding and behind it.
        count: Number of tokens, padding included.
        places: int64, place of each of the tokens of `slots` in the hot pools, negative for those that have none; None
            if there are no hot pools.
    """

    uniform: tuple[UniformCall, ...]
    prompts: Prompts | None
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
        prompts = self._prompts(common, rows, starts, first) if first < requests else None
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

    def _prompts(self, common: Any, rows: PagedRows, starts: list[int], first: int) -> Prompts:
        """The requests from one on, which are prompts."""
        base, whole = starts[first], common.query_start_loc
        own = [start - base for start in starts[first:]]
        on_device = whole[first : len(starts)] - base if first else whole[: len(starts)]
        bound = common.seq_lens_cpu_upper_bound
        counts = [end - start for start, end in itertools.pairwise(own)]
        continued = [True] * len(counts)
        if bound is not None:
            bounds = bound[first : len(starts) - 1].tolist()
            continued = [most > count for most, count in zip(bounds, counts, strict=True)]
        earlier = ()
        if any(continued):
            lengths = rows.lengths[first:] - (on_device[1:] - on_device[:-1])
            earlier = tuple(plan_earlier(own, continued, self._read(PagedRows(rows.table[first:], lengths))))
        return Prompts(base, own, on_device, earlier)

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
