"""Compressed layers for attention that takes tensors: what is stored is compressed, what is returned is not.

`TurboQuantCache(..., dense=True)` is for models whose attention does not go through transformers' AttentionInterface,
and for attention functions other than the cache's own. It saves storage only: each forward pass decompresses all keys
and values of a layer, into tensors that live until the layer has attended.
"""

from typing import Any

import torch

from interop.torch.custom_ops import refuse_gradient

COST = (
    "TurboQuantCache(dense=True) saves storage only: every forward pass decompresses all keys and values of each "
    "compressed layer, one layer at a time, so that a token costs more time and more memory traffic than without "
    "compression. Where the model can have attn_implementation='tq_jax', leave dense out"
)
"""What a dense cache says once."""


@torch.compiler.disable  # the host counts the tokens of a cache
def store_and_read(layer: Any, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stores new tokens in a layer and returns all of its tokens, padding included, as transformers' caches do.

    Args:
        layer: The `CompressedLayer`.
        k: Keys [b, h_kv, t, d].
        v: Values, shaped like the keys.

    Returns:
        Keys and values of all tokens so far, in the type of the new ones: as they are for a prompt that attends to
        itself exactly, or else decompressed, with window and sinks as they were stored.
    """
    exact = layer.attends_exactly
    layer.store(None, k, v, None)
    if exact:
        return k, v
    keys, values = layer.cache.read(k.dtype)
    return refuse_gradient(keys, k), refuse_gradient(values, v)
