"""Encoding of vectors: rotation, scale, step search, codes, packing, and writing into pages."""

from pallas_kernels.encode.api import encode, encode_pages
from pallas_kernels.encode.config import TileConfig
from pallas_kernels.encode.encoder import Encoder

__all__ = ["Encoder", "TileConfig", "encode", "encode_pages"]
