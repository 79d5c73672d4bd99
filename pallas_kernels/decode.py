"""The former place of a part of `pallas_kernels.attention`."""

import warnings

from pallas_kernels import attention
from pallas_kernels.attention import LogitOptions as LogitOptions
from pallas_kernels.attention import Partial as Partial
from pallas_kernels.attention import TileConfig as TileConfig
from pallas_kernels.attention import merge as merge
from pallas_kernels.attention.arguments import from_fields
from pallas_kernels.pages import Pages as Pages

warnings.warn("pallas_kernels.decode has moved to pallas_kernels.attention", DeprecationWarning, stacklevel=2)

decode_attention = from_fields(attention.decode_attention)
"""`pallas_kernels.attention.decode_attention` with the fields of its `PagedArguments` as arguments of their own."""
