"""Encoding of rotated vectors: scale, search, bucketize, pack."""

from pallas_kernels.encode.api import encode

__all__ = ["encode"]
