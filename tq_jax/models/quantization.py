"""The quantization of a Hugging Face checkpoint, as its `config.json` describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tq_jax.models.fields import SIZE, TABLE, TEXT, Kind, check_fields, given, list_of, refuse, table_of

Method = Literal["fp8", "awq", "gptq", "mxfp4"]

_METHODS = ("fp8", "compressed-tensors", "awq", "gptq", "mxfp4")
_PAIR = Kind("a list of two sizes", lambda value: list_of(SIZE).holds(value) and len(value) == 2)
_GROUP = Kind("-1 or a positive whole number", lambda value: value == -1 or SIZE.holds(value))
_KINDS = {
    "quant_method": TEXT,
    "weight_block_size": _PAIR,
    "config_groups": table_of(TABLE),
    "sparsity_config": TABLE,
    "group_size": _GROUP,
    "q_group_size": _GROUP,
    "version": TEXT,
    "dynamic": TABLE,
}


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are stored.

    Attributes:
        method: "fp8" for E4M3 with scales, "awq" and "gptq" for four bits with scales and zero points per group,
            "mxfp4" for E2M1 with a power of two per 32 values.
        block: For "fp8": rows and columns that share a scale, where a scale is that of a block.
        group_size: For "awq" and "gptq": inputs that share scale and zero point; -1 for all of them.
        zero_offset: For "gptq": added to stored zero points.
    """

    method: Method
    block: tuple[int, int] | None = None
    group_size: int = -1
    zero_offset: int = 0


def quantization_from_hf(config: Mapping[str, Any]) -> Quantization | None:
    """Read how a checkpoint is quantized.

    Activations are never quantized here, whatever a file says of them: weights are dequantized as they are loaded.

    Args:
        config: The parsed `config.json`.

    Returns:
        The quantization; None if there is none.

    Raises:
        NotImplementedError: For a method or an option of it that is not supported.
        ValueError: If a field holds a value of another kind.

    Example:
        >>> awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
        >>> quantization_from_hf({"quantization_config": awq}).group_size
        128
    """
    found = given(config, "quantization_config", config.get("compression_config"))
    if found is None:
        return None
    check_fields("config.json quantization_config", found, _KINDS)
    method = found.get("quant_method")
    _refuse("quant_method", method, _METHODS)
    if method == "mxfp4":
        return Quantization("mxfp4")
    return {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq}[method](found)


def _refuse(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    refuse(f"quantization_config {name}", value, allowed)


def _fp8(found: Mapping[str, Any]) -> Quantization:
    _refuse("fmt", given(found, "fmt", "e4m3"), ("e4m3",))
    return _of_block(found.get("weight_block_size"))


def _of_block(block: list[int] | None) -> Quantization:
    return Quantization("fp8", block=None if block is None else (block[0], block[1]))


def _compressed_tensors(found: Mapping[str, Any]) -> Quantization:
    _refuse("format", found.get("format"), ("float-quantized",))
    _refuse("quantization_status", given(found, "quantization_status", "compressed"), ("compressed",))
    _refuse("kv_cache_scheme", found.get("kv_cache_scheme"), (None,))
    _refuse("sparsity_config format", given(found.get("sparsity_config") or {}, "format", "dense"), ("dense",))
    blocks: list[Any] = []
    for group in (found.get("config_groups") or {}).values():
        weights = given(group, "weights", {})
        check_fields("config.json quantization_config weights", {"weights": weights}, {"weights": TABLE})
        check_fields("config.json quantization_config weights", weights, {"block_structure": _PAIR})
        _refuse("format", given(group, "format", "float-quantized"), ("float-quantized",))
        _refuse("weights num_bits", weights.get("num_bits"), (8,))
        _refuse("weights type", weights.get("type"), ("float",))
        _refuse("weights strategy", weights.get("strategy"), ("tensor", "channel", "block"))
        _refuse("weights symmetric", given(weights, "symmetric", True), (True,))
        blocks.append(weights.get("block_structure"))
    for block in blocks:
        _refuse("weights block_structure", block, (blocks[0],))
    return _of_block(blocks[0] if blocks else None)


def _awq(found: Mapping[str, Any]) -> Quantization:
    _refuse("bits", given(found, "bits", found.get("w_bit")), (4,))
    _refuse("version", given(found, "version", "gemm").lower(), ("gemm",))
    _refuse("zero_point", given(found, "zero_point", True), (True,))
    return Quantization("awq", group_size=given(found, "group_size", given(found, "q_group_size", 128)))


def _gptq(found: Mapping[str, Any]) -> Quantization:
    _refuse("bits", found.get("bits"), (4,))
    _refuse("pack_dtype", given(found, "pack_dtype", "int32"), ("int32",))
    _refuse("dynamic", found.get("dynamic") or None, (None,))
    form = given(found, "checkpoint_format", "gptq")
    _refuse("checkpoint_format", form, ("gptq", "gptq_v2"))
    # The first format stores zero points less one.
    return Quantization("gptq", group_size=given(found, "group_size", 128), zero_offset=int(form == "gptq"))
