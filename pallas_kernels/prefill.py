"""The former place of a part of `pallas_kernels.attention`."""

import warnings
from typing import Any

from pallas_kernels import attention
from pallas_kernels.attention import PrefillConfig as PrefillConfig

warnings.warn("pallas_kernels.prefill has moved to pallas_kernels.attention", DeprecationWarning, stacklevel=2)


def prefill_attention(
    query: Any,
    pages: Any,
    block_table: Any,
    lengths: Any,
    *,
    implementation: Any = "auto",
    config: Any = None,
    **others: Any,
) -> attention.Partial:
    """`pallas_kernels.attention.prefill_attention` with the fields of `PagedArguments` as arguments of their own."""
    arguments = attention.PagedArguments(query, pages, block_table, lengths, **others)
    return attention.prefill_attention(arguments, implementation=implementation, config=config)
