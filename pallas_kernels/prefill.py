"""The former place of a part of `pallas_kernels.attention`."""

import warnings

from pallas_kernels import attention
from pallas_kernels.attention import PrefillConfig as PrefillConfig
from pallas_kernels.attention.arguments import from_fields

warnings.warn("pallas_kernels.prefill has moved to pallas_kernels.attention", DeprecationWarning, stacklevel=2)

prefill_attention = from_fields(attention.prefill_attention)
"""`pallas_kernels.attention.prefill_attention` with the fields of its `PagedArguments` as arguments of their own."""
