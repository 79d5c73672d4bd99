"""Differences between versions of JAX, by name: kernels and caches ask for a behaviour, never for a version."""

import jax

LOWERING_NAMES_DEVICE = jax.__version_info__ >= (0, 11)
"""Whether lowering for an absent GPU needs an abstract device; earlier versions assume Hopper."""


def lowers_for_gpu() -> bool:
    """Whether the code runs under an abstract mesh of GPUs, for which JAX lowers without having them."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device is not None and device.platform == "gpu"
