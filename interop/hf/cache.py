"""A compressed cache for Hugging Face transformers 4.57 and 5, passed to `generate` as its cache.

    model.set_attn_implementation("tq_jax")
    model.generate(**inputs, cache=TurboQuantCache(model.config))  # past_key_values= before transformers 5.24

Full-attention layers are compressed, and attention reads their packed pages directly; sliding-window and other layers
stay as transformers has them. A prompt attends to itself exactly; later tokens attend to what the cache holds. Padding
is not stored. Cropping (assisted decoding) drops tokens; a token that is compressed stays compressed.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import transformers
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

import interop.hf.attention  # noqa: F401  (registers the attention function)
import tq_jax as tq
from interop.hf.dense import COST
from interop.hf.layer import CACHE_ARGUMENT, VERSION, CompressedLayer, Compression, layer_bytes
from interop.hf.models import cross_attention_layers, kept_layers, require_supported
from tq_jax.statistics_files import find_statistics, identify, missing_statistics, read_statistics

OWN_OPTIONS = ("key_bits", "value_bits", "max_tokens", "seed", "exact_prompt", "statistics", "dense")
"""Options of `TurboQuantCache` besides the fields of `tq_jax.CacheSpec`."""

OF_THE_MODEL = ("num_kv_heads", "head_dim", "max_tokens", "sliding_window")
"""Fields of `tq_jax.CacheSpec` that each layer fills in itself."""


DISCARDING = ("phi3", "phimoe", "phi4_multimodal")
"""Types of models that discard a cache when a text passes `original_max_position_embeddings`."""

FULL_ATTENTION = ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")
"""Layers of transformers that are compressed, by their names: transformers 4.57 has only the first."""


class TurboQuantCache(Cache):
    """A cache whose full-attention layers are compressed.

    Args:
        config: Configuration of the model, `model.config`.
        key_bits: Bits per key coordinate, as in `tq_jax.QuantizerSpec`.
        value_bits: Bits per value coordinate.
        max_tokens: Tokens per row that the cache has room for from the start; by default the prompt and some more. A
            full cache grows.
        seed: Seed of the quantizers.
        exact_prompt: Whether a prompt attends to its own keys and values before compression. If not, it attends to what
            the cache holds of it, as later tokens do. Without a window and centring it then does not matter how a
            prompt is cut into chunks.
        statistics: Key statistics that are known before the first token: a file of `tq-jax calibrate`, or True for the
            file that it wrote for this model (see `tq_jax.statistics_files`). By default they are those of the prompt.
        dense: Whether layers return all keys and values, decompressed, so that any attention of a model can read them:
            it saves storage only, at a cost in time. Padding is stored then, and keys are not smoothed. Without it,
            attention reads the codes, and has to be "tq_jax".
        options: Further fields of `tq_jax.CacheSpec`: window, sink_tokens, dtype ..., or whole key and value specs in
            place of the bits.

    Attributes:
        kept_layers: Why each of the other layers is not compressed, by its index.

    Raises:
        ValueError: If `config` is no configuration, if the model has no full-attention layer, or for a file of key
            statistics that is damaged or of another model.
        FileNotFoundError: If there is no file of key statistics, and `statistics` asks for it.
        TypeError: For an option that is no field of `tq_jax.CacheSpec`.
        NotImplementedError: For models that `interop.hf.models` refuses.

    Warns:
        UserWarning: If only some layers are compressed; it says which. Also if transformers discards the caches of this
            model when a text passes some length, and of the cost of a dense cache.
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
        statistics: bool | str | Path = False,
        dense: bool = False,
        **options: Any,
    ) -> None:
        _require_config(config)
        _require_known(options)
        model = require_supported(config, version=VERSION, dense=dense)
        compression = Compression(key_bits, value_bits, max_tokens, seed, options, exact_prompt, model, dense)
        compression.describe()
        layers: list[Any] = list(DynamicCache(config=config).layers)
        text = config.get_text_config(decoder=True)
        cross = cross_attention_layers(text)
        full = [i for i, layer in enumerate(layers) if type(layer).__name__ in FULL_ATTENTION and i not in cross]
        if not full:
            kinds = sorted({type(layer).__name__ for layer in layers})
            raise ValueError(f"expected a model with full-attention layers, got {kinds} in {model}")
        given = _known_statistics(config, statistics)
        self.kept_layers = kept_layers(config, layers, full)
        for i in full:
            layers[i] = _compressed(layers[i], compression, None if given is None else (given[0][i], given[1][i]))
        super().__init__(layers=layers)
        for i in full:
            layers[i].peers = self.layers
        if dense:
            warnings.warn(COST, stacklevel=2)
        if self.kept_layers:
            warnings.warn(self.summary(), stacklevel=2)
        if discarded := discarded_above(config):
            warnings.warn(
                f"`generate` of {text.model_type} discards its cache when a text passes {discarded} tokens, and goes "
                f"on with a DynamicCache: nothing is compressed then. Before you generate after a longer prompt, run "
                f"all but its last token by model(ids, {CACHE_ARGUMENT}=cache, logits_to_keep=1)",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        chosen = self.compressed_layers
        first = cast(CompressedLayer, self.layers[chosen[0]])
        return (
            f"TurboQuantCache({first.compression.describe()} in {len(chosen)} of {len(self.layers)} layers, "
            f"{first.seen} tokens, {self.nbytes / 1e6:,.2f} MB)"
        )

    @property
    def compressed_layers(self) -> list[int]:
        """Indices of the compressed layers."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: pages, windows, statistics, rotations, counters, and tensors of the other layers."""
        return sum(layer_bytes(layer) for layer in self.layers)

    def summary(self) -> str:
        """Says which layers are compressed, and how."""
        chosen = self.compressed_layers
        how = cast(CompressedLayer, self.layers[chosen[0]]).compression
        reasons: dict[str, list[int]] = {}
        for i, reason in self.kept_layers.items():
            reasons.setdefault(reason, []).append(i)
        rest = "".join(f"; not layers {indices}: each {reason}" for reason, indices in reasons.items())
        return (
            f"TurboQuantCache compresses {len(chosen)} of {len(chosen) + len(self.kept_layers)} layers {chosen} to "
            f"{how.describe()}{rest}"
        )


def discarded_above(config: PretrainedConfig) -> int | None:
    """Tokens of a text above which `generate` discards the cache of a model; None if there is no such number.

    The rotary embedding of these models has other frequencies for long texts, so that keys are computed anew.
    """
    text = config.get_text_config(decoder=True)
    switch = getattr(text, "original_max_position_embeddings", None)
    if text.model_type not in DISCARDING or switch is None or switch >= text.max_position_embeddings:
        return None
    return switch


def _compressed(
    layer: Any, compression: Compression, statistics: tuple[np.ndarray, np.ndarray] | None
) -> CompressedLayer:
    """A compressed layer in place of one of transformers.

    Raises:
        NotImplementedError: For a layer with states in a release of transformers that holds them otherwise.
    """
    if type(layer) is DynamicLayer:
        return CompressedLayer(compression, statistics)
    if not hasattr(layer, "number_of_states"):
        raise NotImplementedError(
            f"states of layers that are attention and state space at once are read as transformers 5.14 and newer hold "
            f"them, got {compression.model} in transformers {transformers.__version__}: pip install -U transformers"
        )
    from interop.hf.state_layer import CompressedLayerWithState  # transformers 5 only

    return CompressedLayerWithState(compression, statistics, layer.number_of_states)


def _known_statistics(config: PretrainedConfig, statistics: bool | str | Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and weight of the keys of all layers, [layers, h_kv, d] each; None if they are to be the prompt's."""
    if statistics is False:
        return None
    model = identify(config.name_or_path or "", config)
    path = find_statistics(model, None if statistics is True else statistics)
    if path is None:
        raise FileNotFoundError(missing_statistics(model))
    return read_statistics(path, model)


def _require_config(config: Any) -> None:
    """Raises ValueError for anything but the configuration of a model."""
    if not hasattr(config, "get_text_config"):
        hint = ": pass model.config" if hasattr(config, "config") else ""
        raise ValueError(f"expected a config, got {type(config).__name__}{hint}")


def _require_known(options: dict[str, Any]) -> None:
    """Raises TypeError for options that no layer can have."""
    fields = [field.name for field in dataclasses.fields(tq.CacheSpec) if field.name not in OF_THE_MODEL]
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise TypeError(f"expected options among {[*OWN_OPTIONS, *fields]}, got {', '.join(unknown)}")
