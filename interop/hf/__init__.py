"""A compressed cache for Hugging Face transformers 4.57 and 5, passed to `generate` as its cache.

    from interop.hf import TurboQuantCache

    model.set_attn_implementation("tq_jax")
    model.generate(**inputs, cache=TurboQuantCache(model.config))  # past_key_values= before transformers 5.24

The first use of a name of this package imports torch and transformers and registers the attention implementation.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `interop.hf.command` is listed by `tq-jax`, which needs neither torch nor transformers
    from interop.hf.cache import TurboQuantCache
    from interop.hf.handle import ATTENTION
    from interop.hf.layer import CACHE_ARGUMENT, CompressedLayer

__all__ = ["ATTENTION", "CACHE_ARGUMENT", "CompressedLayer", "TurboQuantCache"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("interop.hf.cache")  # registers the attention implementation as well
    homes = {"TurboQuantCache": "cache", "ATTENTION": "handle"}
    return getattr(importlib.import_module(f"interop.hf.{homes.get(name, 'layer')}"), name)
