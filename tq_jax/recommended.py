"""The recommended quantizers: what demo, evaluation, Hugging Face, vLLM and the documents' examples use."""

from typing import Literal

from tq_jax.quantizer import QuantizerSpec


def recommended_quantizers(
    head_dim: int,
    key_bits: float = 4,
    value_bits: float = 4,
    *,
    key_kind: Literal["mse", "prod"] = "mse",
    value_kind: Literal["mse", "group"] = "mse",
    search: bool = True,
) -> tuple[QuantizerSpec, QuantizerSpec]:
    """The recommended quantizers of a head's keys and values; `CacheSpec.recommended` adds the rest of a cache.

    Keys of kind "mse" store the "unbiased" scale and values the "least_squares" scale, both with step search: logits
    want inner products without bias, outputs want vectors of least error. The other kinds have no choice of either.

    Args:
        head_dim: Channels of a head.
        key_bits: Bits per key coordinate, see `QuantizerSpec`.
        value_bits: Bits per value coordinate.
        key_kind: How keys are quantized, "mse" or "prod".
        value_kind: How values are quantized, "mse" or "group".
        search: Whether kind "mse" searches the step of each vector.

    Returns:
        The specs of keys and values.

    Raises:
        ValueError: For an unknown kind.
        NotImplementedError: For bits and dimensions that `QuantizerSpec` does not support.

    Example:
        >>> key, value = recommended_quantizers(128, key_bits=4, value_bits=3)
        >>> key.scale, value.scale, key.search, value.search
        ('unbiased', 'least_squares', True, True)
    """
    mse_key, mse_value = key_kind == "mse", value_kind == "mse"
    key_scale, value_scale = "unbiased" if mse_key else None, "least_squares" if mse_value else None
    return (
        QuantizerSpec(head_dim, key_bits, key_kind, scale=key_scale, search=search and mse_key),
        QuantizerSpec(head_dim, value_bits, value_kind, scale=value_scale, search=search and mse_value),
    )
