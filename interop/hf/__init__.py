"""A compressed cache for Hugging Face transformers 4.57 and 5, passed to `generate` as its cache.

model.set_attn_implementation("tq_jax")
model.generate(**inputs, cache=TurboQuantCache(model.config))  # past_key_values= before transformers 5.24
"""

from interop.hf.cache import TurboQuantCache
from interop.hf.layer import ATTENTION, CACHE_ARGUMENT, CompressedLayer

__all__ = ["ATTENTION", "CACHE_ARGUMENT", "CompressedLayer", "TurboQuantCache"]
