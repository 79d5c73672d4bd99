"""Appending to a whole cache: the full-precision window before and after encoding."""

from pallas_kernels.append.whole_cache import AppendPlan, append_cache, check_append

__all__ = ["AppendPlan", "append_cache", "check_append"]
