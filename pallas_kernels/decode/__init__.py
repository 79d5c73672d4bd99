"""Attention over packed pages."""

from pallas_kernels.decode.api import decode_attention
from pallas_kernels.decode.config import TileConfig
from pallas_kernels.decode.options import LogitOptions
from pallas_kernels.decode.pages import Pages
from pallas_kernels.decode.partial import Partial, merge

__all__ = ["LogitOptions", "Pages", "Partial", "TileConfig", "decode_attention", "merge"]
