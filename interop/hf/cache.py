"""A compressed cache for Hugging Face transformers 4.57 and 5, passed to `generate` as its cache.

    model.set_attn_implementation("tq_jax")
    model.generate(**inputs, cache=TurboQuantCache(model.config))  # past_key_values= before transformers 5.24

Full-attention layers are compressed and attention reads their packed pages directly; sliding-window and other layers
stay as transformers has them. A prompt attends to itself exactly, later tokens to what the cache holds. Padding is not
stored. Cropping (assisted decoding) drops tokens; what is compressed stays compressed.
"""

import warnings
from typing import Any, cast

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

import interop.hf.attention  # noqa: F401  (registers the attention function)
from interop.hf.layer import CompressedLayer, Compression, layer_bytes


class TurboQuantCache(Cache):
    """A cache whose full-attention layers are compressed.

    Args:
        config: The model's.
        key_bits: Bits a key coordinate, as in `tq_jax.QuantizerSpec`.
        value_bits: Bits a value coordinate.
        max_tokens: Tokens a row to have room for from the start; by default the prompt and some more. It grows.
        seed: Seed of the quantizers.
        exact_prompt: Whether a prompt attends to itself as it is. If not, it attends to what the cache holds of it, as
            later tokens do; without a window and centring it then does not matter how a prompt is cut into chunks.
        options: Further fields of `tq_jax.CacheSpec` (window, sink_tokens, dtype ..., or whole key and value specs, in
            place of the bits).

    Raises:
        ValueError: If the model has no full-attention layer, or for options that no `tq_jax.CacheSpec` has.
        NotImplementedError: For models whose layers share keys and values.

    Warns:
        UserWarning: Which layers are compressed, if not all are.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        key_bits: float = 4,
        value_bits: float = 4,
        max_tokens: int | None = None,
        seed: int = 0,
        exact_prompt: bool = True,
        **options: Any,
    ) -> None:
        text = config.get_text_config(decoder=True)
        if getattr(text, "num_kv_shared_layers", 0):
            raise NotImplementedError(
                f"layers that share keys and values are not compressed, got num_kv_shared_layers="
                f"{text.num_kv_shared_layers}"
            )
        compression = Compression(key_bits, value_bits, max_tokens, seed, options, exact_prompt)
        compression.describe()
        layers: list[Any] = list(DynamicCache(config=config).layers)
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise ValueError(
                f"expected a model with full-attention layers, got {sorted({type(layer).__name__ for layer in layers})}"
            )
        for i in full:
            layers[i] = CompressedLayer(compression)
        super().__init__(layers=layers)
        if len(full) < len(layers):
            warnings.warn(self.summary(), stacklevel=2)

    @property
    def compressed_layers(self) -> list[int]:
        """Which layers are compressed."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: pages, windows, statistics, rotations and counters, and those of the other layers."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                total += 0 if layer.cache is None else layer.cache.nbytes
            else:
                total += layer_bytes(layer)
        return total

    def summary(self) -> str:
        """Which layers are compressed and how."""
        chosen = self.compressed_layers
        how = cast(CompressedLayer, self.layers[chosen[0]]).compression
        others = sorted({type(layer).__name__ for layer in self.layers if not isinstance(layer, CompressedLayer)})
        rest = f"; the others are kept as {', '.join(others)}" if others else ""
        return (
            f"TurboQuantCache compresses {len(chosen)} of {len(self.layers)} layers {chosen} to {how.describe()}{rest}"
        )
