"""Attention over packed pages and over whole caches."""

from pallas_kernels.attention.api import decode_attention, prefill_attention
from pallas_kernels.attention.arguments import PagedArguments
from pallas_kernels.attention.block_table import (
    FullPrecisionBlocks,
    FullPrecisionSegment,
    PagedArrays,
    attend_block_table,
)
from pallas_kernels.attention.decode.config import TileConfig
from pallas_kernels.attention.decode.launch_triton import MAX_QUERY_TOKENS
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial, merge
from pallas_kernels.attention.pipeline import AttendPlan
from pallas_kernels.attention.prefill.config import PrefillConfig
from pallas_kernels.attention.whole_cache import CacheArrays, attend_cache

__all__ = [
    "MAX_QUERY_TOKENS",
    "AttendPlan",
    "CacheArrays",
    "FullPrecisionBlocks",
    "FullPrecisionSegment",
    "LogitOptions",
    "PagedArguments",
    "PagedArrays",
    "Partial",
    "PrefillConfig",
    "TileConfig",
    "attend_block_table",
    "attend_cache",
    "decode_attention",
    "merge",
    "prefill_attention",
]
