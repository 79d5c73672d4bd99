"""Appending to a whole cache: tokens leave the full-precision window, are encoded, and new tokens enter it.

docs/decode_step.md draws the launches of a step.
"""

from pallas_kernels.append.whole_cache import AppendPlan, append_cache, check_append

__all__ = ["AppendPlan", "append_cache", "check_append"]
