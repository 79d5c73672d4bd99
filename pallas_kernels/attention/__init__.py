"""Attention over packed pages and over whole caches."""

from pallas_kernels.attention.decode.api import decode_attention
from pallas_kernels.attention.decode.config import TileConfig
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial, merge
from pallas_kernels.attention.prefill.api import prefill_attention
from pallas_kernels.attention.prefill.config import PrefillConfig

__all__ = [
    "LogitOptions",
    "Partial",
    "PrefillConfig",
    "TileConfig",
    "decode_attention",
    "merge",
    "prefill_attention",
]
