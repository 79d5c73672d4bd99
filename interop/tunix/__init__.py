"""Compressed caches for the models and the sampler of Tunix (PyPI google-tunix).

    from interop.tunix import compress
    from tunix.generate.sampler import CacheConfig, Sampler

    model = compress(model, key_bits=4, value_bits=4)            # shares the weights of the model
    sampler = Sampler(model, tokenizer, CacheConfig(cache_size, num_layers, num_kv_heads, head_dim))
    sampler(prompts, max_generation_steps=256)                   # the sampler of Tunix, unchanged

`compress` gives the model an `init_cache`, which the sampler asks for, and its attention layers a `block` that appends
to that cache and attends to its codes. Projections, rotary embedding and everything else are those of Tunix, and so is
every call without a cache: training, and log-probabilities. Parameters keep their names, so that
`sampler.transformer_state = state` takes the weights of a trainer.

Supported: Llama 3, Qwen 2 and 2.5, Qwen 3, Gemma, Gemma 2 and Gemma 3 without images; greedy, top-p and beam search;
left-padded prompts, whose padding is not stored; grouped queries, sliding windows, soft-caps.
Refused: other models, images, segment ids, several devices; and masks that are not causal, which give NaN under jit.
"""

from interop.tunix.cache import LayerCache
from interop.tunix.compress import compress

__all__ = ["LayerCache", "compress"]
