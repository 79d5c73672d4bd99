"""The former place of a part of `pallas_kernels.attention`."""

import warnings

from pallas_kernels.attention import PrefillConfig as PrefillConfig
from pallas_kernels.attention import prefill_attention as prefill_attention

warnings.warn("pallas_kernels.prefill has moved to pallas_kernels.attention", DeprecationWarning, stacklevel=2)
