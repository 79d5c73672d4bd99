"""Which models of transformers can have a `TurboQuantCache`, known from their configuration, before weights are loaded.

A model can have one if its attention goes through transformers' AttentionInterface and its cache holds keys and values.
"""

from collections.abc import Collection, Sequence
from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention")
"""Entries of `layer_types` whose layers hold nothing but keys and values."""


SHARES_IN_A_PASS = (5, 10)
"""Release of transformers from which layers that share keys and values get them from each other."""


def require_supported(config: PretrainedConfig, *, version: tuple[int, ...], dense: bool = False) -> str:
    """Refuses models whose layers cannot be compressed.

    Args:
        config: Configuration of the model.
        version: Major and minor version of transformers.
        dense: Whether layers return all keys and values as tensors, so that any attention can read them.

    Returns:
        Name of the model's class, for messages.

    Raises:
        NotImplementedError: For attention outside AttentionInterface and latents in place of keys and values; and, in
            older releases of transformers, for hybrids and layers that share keys and values.
    """
    text = config.get_text_config(decoder=True)
    decoder = _decoder(text)
    name = _name(config, decoder if text is config else None)
    if not dense and decoder is not None and not decoder._can_set_attn_implementation():
        raise NotImplementedError(
            f"expected a model whose attention goes through transformers' AttentionInterface, got {name} with "
            f"{decoder.__name__}: use DynamicCache, or dense=True, which saves storage only"
        )
    if rank := getattr(text, "kv_lora_rank", None):
        raise NotImplementedError(
            f"multi-head latent attention keeps latents and no keys and values, got {name} with kv_lora_rank={rank}: "
            "use DynamicCache"
        )
    shared = getattr(text, "num_kv_shared_layers", 0)
    if shared and version < SHARES_IN_A_PASS:
        raise NotImplementedError(
            f"layers of a forward pass hand each other their keys and values from transformers "
            f"{SHARES_IN_A_PASS[0]}.{SHARES_IN_A_PASS[1]} on; before, the cache keeps them in full precision, got "
            f"{name} with num_kv_shared_layers={shared}: pip install 'transformers>=5.10'"
        )
    others = _other_states(text)
    if others and version < (5, 0):
        raise NotImplementedError(
            f"layers of {others} are told from attention by transformers 5, got {name} in transformers "
            f"{transformers.__version__}: pip install 'transformers>=5'"
        )
    return name


def cross_attention_layers(text: PretrainedConfig) -> frozenset[int]:
    """Layers that attend to an image or a sound: their keys are not those of the text's tokens."""
    return frozenset(getattr(text, "cross_attention_layers", None) or ())


def _name(config: PretrainedConfig, model: Any) -> str:
    """The model's class as its configuration names it, or else that of transformers, or else the configuration's."""
    named = getattr(config, "architectures", None)
    return named[0] if named else (type(config) if model is None else model).__name__


def _decoder(text: PretrainedConfig) -> Any:
    """Class of the text model; None if transformers has none for this configuration, as with code from elsewhere."""
    for auto in (AutoModelForCausalLM, AutoModel):
        try:
            found = auto._model_mapping[type(text)]  # pyright: ignore[reportAttributeAccessIssue]
        except KeyError:
            continue
        return found[0] if isinstance(found, tuple) else found
    return None


def _other_states(text: PretrainedConfig) -> list[str]:
    """Kinds of layers that hold other states than keys and values, by their names in the configuration."""
    kinds = getattr(text, "layer_types", None)
    if not kinds and any(name.startswith("mamba_") for name in vars(text)):
        return ["mamba"]
    kinds = kinds or getattr(text, "layers_block_type", None) or ()
    return sorted(set(kinds) - set(ATTENTION_TYPES))


KEPT = {
    "DynamicSlidingWindowLayer": "keeps the latest tokens of its sliding window only",
    "LinearAttentionLayer": "keeps a state, which does not grow, and no keys and values",
    "LinearAttentionAndSlidingWindowAttentionLayer": "keeps a state and the latest tokens of its sliding window only",
    "DummyLayer": "has no attention",
}
"""Why a layer is not compressed, by the name of its class in transformers."""


def kept_layers(config: PretrainedConfig, layers: Sequence[Any], compressed: Collection[int]) -> dict[int, str]:
    """Why layers are not compressed.

    Args:
        config: Configuration of the model.
        layers: The layers of transformers' cache for it.
        compressed: Indices of those that are compressed.

    Returns:
        The reason of each other layer, by its index.
    """
    text = config.get_text_config(decoder=True)
    owners, cross = _owners(text), cross_attention_layers(text)
    reasons = {i: KEPT.get(type(layer).__name__, f"is a {type(layer).__name__}") for i, layer in enumerate(layers)}
    reasons |= dict.fromkeys(cross, "keeps keys and values of an image or a sound, not of the text")
    reasons |= {i: f"attends over the keys and values of layer {owner}" for i, owner in owners.items()}
    return {i: reason for i, reason in sorted(reasons.items()) if i not in compressed}


def _owners(text: PretrainedConfig) -> dict[int, int]:
    """Layers that have no keys and values of their own, and the layer of each whose keys and values it reads."""
    shared, count = getattr(text, "num_kv_shared_layers", None) or 0, text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * count
    own = kinds[: count - shared]
    return {i: len(own) - 1 - own[::-1].index(kinds[i]) for i in range(len(own), count)} if own else {}
