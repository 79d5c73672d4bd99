"""The metadata of a step: the calls by which its queries attend, made once and shared by the layers."""

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

from interop.vllm.calls import SIZES, Call, plan_calls
from interop.vllm.report import report


@dataclasses.dataclass
class TurboQuantMetadata(AttentionMetadata):
    """The metadata of a step.

    Attributes:
        calls: The calls by which its queries attend.
    """

    calls: list[Call]


class TurboQuantBuilder(AttentionMetadataBuilder[TurboQuantMetadata]):
    """Makes the metadata of every step; when made itself, checks the configuration and logs the summary."""

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
        """Plans the calls of a step."""
        common = common_attn_metadata
        if not isinstance(common.causal, bool) or not common.causal:
            raise NotImplementedError(f"attention over compressed pages is causal, got causal={common.causal}")
        count = common.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].tolist()
        table = common.block_table_tensor[:count]
        return TurboQuantMetadata(plan_calls(starts, common.seq_lens[:count], table, self._sizes))


def _require_whole_blocks(vllm_config: Any, spec: Any) -> None:
    """Raises NotImplementedError if vLLM would zero or copy blocks as runs of bytes, which other blocks share."""
    if getattr(vllm_config.model_config, "is_hybrid", False):
        raise NotImplementedError(
            "models with state-space layers are not supported: vLLM zeroes blocks of their caches"
        )
    unit = getattr(vllm_config.cache_config, "hash_block_size", None)
    if unit is not None and unit != spec.block_size:
        raise NotImplementedError(
            f"prefixes are shared block by block, got hash_block_size={unit} of {spec.block_size}"
        )
