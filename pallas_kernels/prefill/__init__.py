"""Attention of many query tokens over packed pages."""

from pallas_kernels.prefill.api import prefill_attention
from pallas_kernels.prefill.config import PrefillConfig

__all__ = ["PrefillConfig", "prefill_attention"]
