"""Attention of prompts: exact over the tokens of their own chunks, over dense copies of earlier tokens.

All prompts of a kind are one call of the attention that vLLM has for them (`interop.vllm.chunks`). Where there is none,
which is on CPUs, for float32 and for head dims that FlashAttention lacks, torch does the same.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.paged import PagedPool
from interop.vllm.chunks import Chunks, Earlier
from interop.vllm.dense_space import DenseSpace

BLOCK = 256
"""Queries that torch attends with at a time; bounds its matrix of logits."""


@dataclasses.dataclass(frozen=True)
class DenseCall:
    """Keys and values of some KV heads, dense, for the chunks of successive prompts.

    Attributes:
        key: [tokens or more, heads, d].
        value: [tokens or more, heads, d].
        starts: int32 [prompts + 1], first token of each prompt, and the end of the last one.
        longest: Most tokens of a prompt.
    """

    key: torch.Tensor
    value: torch.Tensor
    starts: torch.Tensor
    longest: int


class PromptAttention:
    """The attention of one layer for prompts.

    Args:
        space: Memory of dense tokens.
        options: Of the logits, with a scale.
    """

    def __init__(self, space: DenseSpace, options: AttendOptions) -> None:
        assert options.scale is not None
        self.space, self._options, self._scale = space, options, options.scale
        self._version = _flash_version(space.dim, space.dtype, capped=options.softcap is not None)

    @property
    def name(self) -> str:
        """What attends within a chunk."""
        return "torch" if self._version is None else f"FlashAttention {self._version}"

    def take(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat memory of dense keys and of values: vLLM's own workspace on a GPU, which it counts and shares."""
        shape, dtype = (self.space.elements,), self.space.dtype
        if device.type == "cuda" and is_workspace_manager_initialized():
            keys, values = current_workspace_manager().get_simultaneous((shape, dtype), (shape, dtype))
            return keys, values
        keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        return keys, values

    def __call__(
        self,
        pool: PagedPool | None,
        chunks: Chunks,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """Attends with the queries of successive prompts.

        Args:
            pool: The layer's pages; None if no prompt has earlier tokens.
            chunks: Which tokens are the prompts'.
            query: [tokens, h_q, d], of the step.
            key: [tokens, h_kv, d].
            value: [tokens, h_kv, d].
            output: [tokens, h_q, d], written at the prompts' tokens.
            sinks: float32 [h_q], learned logits without a value.
        """
        part = slice(chunks.first, chunks.first + chunks.starts[-1])
        query, key, value, output = query[part].contiguous(), key[part], value[part], output[part]
        if (earlier := chunks.earlier) is None:
            dense = DenseCall(key, value, chunks.starts_on_device, chunks.longest)
            self._attend(chunks, query, dense, output, sinks)
            return
        assert pool is not None
        group, at_once = query.shape[1] // key.shape[1], self.space.heads_at_once(earlier.count)
        for first in range(0, key.shape[1], at_once):
            heads, of_query = slice(first, first + at_once), slice(first * group, (first + at_once) * group)
            dense = self._dense(pool, earlier, key[:, heads], value[:, heads], first)
            own = None if sinks is None else sinks[of_query]
            self._attend(chunks, query[:, of_query], dense, output[:, of_query], own)

    def _dense(
        self, pool: PagedPool, earlier: Earlier, key: torch.Tensor, value: torch.Tensor, first: int
    ) -> DenseCall:
        """Earlier tokens and those of the chunks, of the KV heads from one on."""
        count = key.shape[1]
        heads = torch.arange(first, first + count, dtype=torch.int32, device=key.device)
        shape = (self.space.tokens(count), count, self.space.dim)
        dense = tuple(x[: math.prod(shape)].view(shape) for x in self.take(key.device))
        pool.dequantize(earlier.rows, earlier.starts, heads, (dense[0], dense[1]))
        if (hot := earlier.hot) is not None:
            assert pool.hot is not None
            for tokens, exact in zip(dense, (pool.hot.keys, pool.hot.values), strict=True):
                tokens.index_copy_(0, hot.places, exact[:, first : first + count].index_select(0, hot.sources))
        for tokens, new in zip(dense, (key, value), strict=True):
            tokens.index_copy_(0, earlier.own, new.to(tokens.dtype))
        return DenseCall(dense[0], dense[1], earlier.ends, earlier.longest)

    def _attend(
        self,
        chunks: Chunks,
        query: torch.Tensor,
        dense: DenseCall,
        output: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """Causal attention of chunks that end with their prompts' last tokens, written to the output."""
        if self._version is None:
            log_sum_exp = _attend_by_torch(chunks.starts, query, dense, output, self._options)
        else:
            log_sum_exp = self._flash(chunks, query, dense, output, sums=sinks is not None)
        if sinks is not None:
            assert log_sum_exp is not None
            output.mul_(torch.sigmoid(log_sum_exp - sinks[:, None]).T[..., None])

    def _flash(
        self, chunks: Chunks, query: torch.Tensor, dense: DenseCall, output: torch.Tensor, *, sums: bool
    ) -> torch.Tensor | None:
        """`_attend` by vLLM's FlashAttention; the log-sum-exp [h_q, tokens] if asked for."""
        window = self._options.sliding_window
        found = _flash_attention()(
            q=query,
            k=dense.key,
            v=dense.value,
            out=output,
            cu_seqlens_q=chunks.starts_on_device,
            cu_seqlens_k=dense.starts,
            max_seqlen_q=chunks.longest,
            max_seqlen_k=dense.longest,
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
    starts: list[int], query: torch.Tensor, dense: DenseCall, output: torch.Tensor, options: AttendOptions
) -> torch.Tensor:
    """As `PromptAttention._flash`, in float32, block by block of queries; waits for the device."""
    log_sum_exp = query.new_empty(query.shape[1::-1], dtype=torch.float32)
    spans = zip(itertools.pairwise(starts), itertools.pairwise(dense.starts.tolist()), strict=True)
    for (start, end), (head, tail) in spans:
        ahead = (tail - head) - (end - start)  # tokens before the chunk
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            before = ahead + first - start  # tokens before the block
            begin = 0 if options.sliding_window is None else max(0, before - options.sliding_window + 1)
            seen = slice(head + begin, head + before + last - first)
            parts = query[first:last], dense.key[seen], dense.value[seen]
            out, sums = _attend_block(*parts, before - begin, options)
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
