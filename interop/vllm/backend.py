"""The attention backend as vLLM sees it: what it supports, how many bytes a token takes, and the metadata of a step."""

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout  # pyright: ignore[reportPrivateImportUsage]

from interop.vllm.calls import SIZES, Call, plan_calls
from interop.vllm.options import Options
from interop.vllm.report import report
from tq_jax.quantizer import MAX_DIM, MIN_DIM


class TurboQuantBackend(AttentionBackend):
    """The backend before a layer is loaded; `for_options` makes the one that knows how the layer is compressed."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto"]

    @staticmethod
    def get_name() -> str:
        """The member of `AttentionBackendEnum`."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        """What runs in a layer."""
        from interop.vllm.impl import TurboQuantImpl

        return TurboQuantImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """What makes the metadata of a step."""
        return TurboQuantBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Multiples of 32 keep every pool aligned to 64 bytes."""
        return [MultipleOf(32)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Multiples of 64: on a GPU a tile of a long chunk is then of one block."""
        return default_block_size if default_block_size % 64 == 0 else 64

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layers one after the other: the pools of a layer are dense."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether quantizers of this dimension exist."""
        return MIN_DIM <= head_size <= MAX_DIM

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks take part in the softmax."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are honoured."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors move blocks as runs of bytes, which they are not."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Calls are planned by the query lengths that the host knows."""
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Nothing is known yet."""
        return spec


@functools.cache
def for_options(options: Options) -> type[TurboQuantBackend]:
    """The backend of layers that are compressed in one way; the same class for the same options."""

    class TurboQuantLayers(TurboQuantBackend):
        @classmethod
        def customize_spec(cls, spec: Any) -> Any:
            """The true bytes of a token; the type stays the model's, because vLLM zeroes blocks of mixed types."""
            if spec.head_size_v != spec.head_size:
                raise NotImplementedError(
                    f"keys and values of one size are compressed, got {spec.head_size} and {spec.head_size_v}"
                )
            return dataclasses.replace(
                spec, state_content_bytes=options.content_bytes(spec.head_size, spec.dtype.itemsize)
            )

    return TurboQuantLayers


@dataclasses.dataclass
class TurboQuantMetadata(AttentionMetadata):
    """The calls of a step, shared by the layers."""

    calls: list[Call]


class TurboQuantBuilder(AttentionMetadataBuilder[TurboQuantMetadata]):
    """Makes the metadata of a step, and, once, checks the configuration and reports."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if kv_cache_spec.state_content_bytes is None:
            raise RuntimeError(
                f"this vLLM does not say how many bytes a token takes in {layer_names}: got {kv_cache_spec}"
            )
        _require_whole_blocks(vllm_config, kv_cache_spec)
        self._sizes = SIZES[device.type]
        report(vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TurboQuantMetadata:
        """The calls of a step."""
        common = common_attn_metadata
        if not isinstance(common.causal, bool) or not common.causal:
            raise NotImplementedError(f"attention over compressed pages is causal, got causal={common.causal}")
        count = common.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].tolist()
        table = common.block_table_tensor[:count]
        return TurboQuantMetadata(plan_calls(starts, common.seq_lens[:count], table, self._sizes))


def _require_whole_blocks(vllm_config: Any, spec: Any) -> None:
    """Raises NotImplementedError where vLLM would zero or copy blocks as runs of bytes: here those are others'."""
    if getattr(vllm_config.model_config, "is_hybrid", False):
        raise NotImplementedError(
            "models with state-space layers are not supported: vLLM zeroes blocks of their caches"
        )
    unit = getattr(vllm_config.cache_config, "hash_block_size", None)
    if unit is not None and unit != spec.block_size:
        raise NotImplementedError(
            f"prefixes are shared block by block, got hash_block_size={unit} of {spec.block_size}"
        )
