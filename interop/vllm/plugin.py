"""The entry points, which vLLM calls in each of its processes. They import neither JAX nor torch."""

BACKEND = "interop.vllm.backend.TurboQuantBackend"
PLATFORM = "interop.vllm.platform.TurboQuantCpuPlatform"


def register() -> None:
    """Registers the backend as `--attention-backend CUSTOM`; entry point of `vllm.general_plugins`."""
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    logger = init_logger("vllm.tq_jax")  # a child of vLLM's logger, whose handlers show its messages
    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        logger.warning("tq_jax is not available: attention backend CUSTOM is %s already", custom.get_path())
        return
    register_backend(custom, BACKEND)
    if current_platform.is_cpu() and f"{type(current_platform).__module__}" != PLATFORM.rpartition(".")[0]:
        logger.warning(
            "tq_jax is not available: vLLM's CPU platform ignores --attention-backend CUSTOM, and plugin tq_jax_cpu, "
            "which replaces it, is not active (unset VLLM_TARGET_DEVICE, and add tq_jax_cpu to VLLM_PLUGINS)"
        )


def platform() -> str | None:
    """Path of the CPU platform that honours the backend, None elsewhere; entry point of `vllm.platform_plugins`."""
    from vllm.platforms import cpu_platform_plugin

    return PLATFORM if cpu_platform_plugin() is not None else None
