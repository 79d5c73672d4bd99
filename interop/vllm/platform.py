"""vLLM's CPU platform with one change: it honours `--attention-backend CUSTOM`, as the CUDA platform does."""

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from interop.vllm.options import SECTION, Options

# The class that vLLM would take on this CPU; there is one for each kind of CPU.
_Base: Any = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")


class TurboQuantCpuPlatform(_Base):
    """The platform of this CPU, which also offers the backend of this package."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Refuses unknown options, and options without the backend that reads them.

        A model that drafts has its own choice of a backend in a copy of the configuration, which vLLM makes when the
        layers of the served model exist already.
        """
        super().check_and_update_config(vllm_config)
        Options.from_config(vllm_config.additional_config)
        given = isinstance(vllm_config.additional_config, dict) and SECTION in vllm_config.additional_config
        attention = vllm_config.attention_config
        chosen = [attention.backend, *(getattr(attention, "backend_per_kind", None) or {}).values()]
        drafts = vllm_config.speculative_config is not None and vllm_config.compilation_config.static_forward_context
        if given and not drafts and AttentionBackendEnum.CUSTOM not in chosen:
            raise ValueError(f"expected --attention-backend CUSTOM with {SECTION} options, got {attention.backend}")
        model = vllm_config.model_config
        if given and model is not None and model.is_attention_free:
            raise ValueError(f"expected a model with attention with {SECTION} options, got {model.architectures}")

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """The import path of the backend of a layer.

        Raises:
            ValueError: If the backend of this package is selected and does not fit the layer.
        """
        if selected_backend != AttentionBackendEnum.CUSTOM:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        backend: Any = selected_backend.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"attention backend CUSTOM does not fit this model: {reasons}")
        return selected_backend.get_path()
