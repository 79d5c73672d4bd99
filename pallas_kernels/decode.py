"""The former place of a part of `pallas_kernels.attention`."""

import warnings
from typing import Any

from pallas_kernels import attention
from pallas_kernels.attention import LogitOptions as LogitOptions
from pallas_kernels.attention import Partial as Partial
from pallas_kernels.attention import TileConfig as TileConfig
from pallas_kernels.attention import merge as merge
from pallas_kernels.pages import Pages as Pages

warnings.warn("pallas_kernels.decode has moved to pallas_kernels.attention", DeprecationWarning, stacklevel=2)


def decode_attention(
    query: Any,
    pages: Any,
    block_table: Any,
    lengths: Any,
    *,
    implementation: Any = "auto",
    config: Any = None,
    **others: Any,
) -> Partial:
    """`pallas_kernels.attention.decode_attention` with the fields of `PagedArguments` as arguments of their own."""
    arguments = attention.PagedArguments(query, pages, block_table, lengths, **others)
    return attention.decode_attention(arguments, implementation=implementation, config=config)
