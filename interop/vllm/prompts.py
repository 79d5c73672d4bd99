"""Attention of prompts: exact over the tokens of their own chunks, over codes for earlier tokens, merged.

All prompts of a step are one call of the attention that vLLM has for them. Where there is none, which is on CPUs, for
float32 and for head dims that FlashAttention lacks, torch does the same.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.paged import PagedPool
from interop.vllm.calls import EarlierCall, empty_earlier

BLOCK = 256
"""Queries that torch attends with at a time; bounds its matrix of logits."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a step, one after the other.

    Attributes:
        first: Index of the first token among the tokens of the step.
        starts: Index of the first token of each prompt among those of the prompts, and the end of the last one.
        starts_on_device: The same, int32.
        earlier: The calls over earlier tokens; none if all chunks are the first of their prompts.
    """

    first: int
    starts: list[int]
    starts_on_device: torch.Tensor
    earlier: tuple[EarlierCall, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk."""
        return max(end - start for start, end in itertools.pairwise(self.starts))


class PromptAttention:
    """The attention of one layer for prompts.

    Args:
        head_size: Channels of a head.
        dtype: Type of queries, keys and values.
        options: Of the logits, with a scale.
    """

    def __init__(self, head_size: int, dtype: torch.dtype, options: AttendOptions) -> None:
        assert options.scale is not None
        self._options, self._scale = options, options.scale
        self._version = _flash_version(head_size, dtype, capped=options.softcap is not None)

    @property
    def name(self) -> str:
        """What attends within a chunk."""
        return "torch" if self._version is None else f"FlashAttention {self._version}"

    def __call__(
        self,
        pool: PagedPool | None,
        prompts: Prompts,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """Attends with the prompts' queries of a step.

        Args:
            pool: The layer's pages; None if no prompt has earlier tokens.
            prompts: Which tokens are the prompts'.
            query: [tokens, h_q, d], of the step.
            key: [tokens, h_kv, d].
            value: [tokens, h_kv, d].
            output: [tokens, h_q, d], written at the prompts' tokens.
            sinks: float32 [h_q], learned logits without a value.
        """
        part = slice(prompts.first, prompts.first + prompts.starts[-1])
        query, key, value, output = query[part], key[part], value[part], output[part]
        merges = bool(prompts.earlier)
        log_sum_exp = self._within(prompts, query, key, value, output, sums=merges or sinks is not None)
        if merges:
            assert pool is not None and log_sum_exp is not None
            earlier, sums = empty_earlier(query)
            for call in prompts.earlier:
                call.attend(pool, query, earlier, sums, self._options)
            both = None if sinks is None else torch.empty_like(log_sum_exp)
            merge_attn_states(output, earlier, sums.T.contiguous(), output, log_sum_exp, both)
            log_sum_exp = both
        if sinks is not None:
            assert log_sum_exp is not None
            output.mul_(torch.sigmoid(log_sum_exp - sinks[:, None]).T[..., None])

    def _within(
        self,
        prompts: Prompts,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        *,
        sums: bool,
    ) -> torch.Tensor | None:
        """Causal attention within chunks, written to the output; the log-sum-exp [h_q, tokens] if asked for."""
        if self._version is None:
            return _attend_by_torch(prompts.starts, query, key, value, output, self._options)
        window = self._options.sliding_window
        found = _flash_attention()(
            q=query.contiguous(),
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=prompts.starts_on_device,
            cu_seqlens_k=prompts.starts_on_device,
            max_seqlen_q=prompts.longest,
            max_seqlen_k=prompts.longest,
            softmax_scale=self._scale,
            causal=True,
            window_size=None if window is None else [window - 1, 0],
            softcap=self._options.softcap or 0.0,
            return_softmax_lse=sums,
            fa_version=self._version,
        )
        return found[1] if sums else None


def _flash_version(head_size: int, dtype: torch.dtype, *, capped: bool) -> int | None:
    """The version of vLLM's FlashAttention for a layer; None if it has none."""
    if not current_platform.is_cuda() or dtype not in (torch.float16, torch.bfloat16) or head_size % 8:
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return get_flash_attn_version(head_size=head_size, requires_softcap=capped)


@functools.cache
def _flash_attention() -> Any:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return flash_attn_varlen_func


def _attend_by_torch(
    starts: list[int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    options: AttendOptions,
) -> torch.Tensor:
    """As `PromptAttention._within`, in float32, block by block of queries."""
    log_sum_exp = query.new_empty(query.shape[1::-1], dtype=torch.float32)
    for start, end in itertools.pairwise(starts):
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            begin = start if options.sliding_window is None else max(start, first - options.sliding_window + 1)
            parts = query[first:last], key[begin:last], value[begin:last]
            out, sums = _attend_block(*parts, first - begin, options)
            output[first:last], log_sum_exp[:, first:last] = out.to(output.dtype), sums
    return log_sum_exp


def _attend_block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ahead: int, options: AttendOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [n, h_q, d] and log-sum-exp [h_q, n] of n queries; the first has `ahead` keys before its own."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
    logits = torch.einsum("nhd,mhd->hnm", query.float(), keys) * (options.scale or query.shape[-1] ** -0.5)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    age = ahead + torch.arange(len(query))[:, None] - torch.arange(len(key))  # [n, m]
    seen = (age >= 0) & (age < (options.sliding_window or len(key) + 1))
    logits = logits.masked_fill(~seen.to(logits.device), -math.inf)
    return torch.einsum("hnm,mhd->nhd", logits.softmax(-1), values), logits.logsumexp(-1)
