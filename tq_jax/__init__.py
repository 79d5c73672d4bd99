"""KV-cache compression for LLM inference by TurboQuant (arXiv 2504.19874): pure functions over pytrees."""

from pallas_kernels.format import Code
from tq_jax import _installation, codebook
from tq_jax.append import append
from tq_jax.attention import attend
from tq_jax.cache import Cache, init_cache, resize
from tq_jax.cache_spec import CacheDtype, CacheSpec
from tq_jax.quantizer import (
    Quantizer,
    QuantizerSpec,
    dequantize,
    inner_product,
    make_quantizer,
    outlier_channels,
    quantize,
)
from tq_jax.recommended import recommended_quantizers
from tq_jax.store import load_cache, load_statistics, save_cache, save_statistics

__all__ = [
    "Cache",
    "CacheDtype",
    "CacheSpec",
    "Code",
    "Quantizer",
    "QuantizerSpec",
    "append",
    "attend",
    "codebook",
    "dequantize",
    "init_cache",
    "inner_product",
    "load_cache",
    "load_statistics",
    "make_quantizer",
    "outlier_channels",
    "quantize",
    "recommended_quantizers",
    "resize",
    "save_cache",
    "save_statistics",
]

__version__ = _installation.version()
_installation.warn_if_interop_is_hidden()
