"""The former place of a part of `pallas_kernels.attention`."""

import warnings

from pallas_kernels.attention import LogitOptions as LogitOptions
from pallas_kernels.attention import Partial as Partial
from pallas_kernels.attention import TileConfig as TileConfig
from pallas_kernels.attention import decode_attention as decode_attention
from pallas_kernels.attention import merge as merge
from pallas_kernels.pages import Pages as Pages

warnings.warn("pallas_kernels.decode has moved to pallas_kernels.attention", DeprecationWarning, stacklevel=2)
