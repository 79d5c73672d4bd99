"""The GPU that JAX has: its size and generation, and the time of its kernels."""

from collections.abc import Callable
from typing import Any

import jax

H100_MULTIPROCESSORS = 132
"""Multiprocessors of an H100, for which plans are made where there is no GPU."""

HOPPER, BLACKWELL = 90, 100
"""Compute capabilities of data-centre GPUs that tiles are tuned for, times ten: H100 and H200, B100 and B200."""


def multiprocessors() -> int:
    """Multiprocessors of JAX's GPU; those of an H100 where there is none."""
    if jax.default_backend() != "gpu":
        return H100_MULTIPROCESSORS
    return int(getattr(jax.devices()[0], "core_count", H100_MULTIPROCESSORS))


def compute_capability() -> int:
    """Compute capability of JAX's GPU, times ten; that of Hopper where there is none."""
    if jax.default_backend() != "gpu":
        return HOPPER
    major, minor = str(jax.devices()[0].compute_capability).split(".")
    return 10 * int(major) + int(minor)


def gpu_kernel_times(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Name and milliseconds of each GPU kernel that the process launches, JAX's or not, in order of launch.

    Args:
        run: Launches the kernels and waits for them.
    """
    from jax._src.lib import mosaic_gpu

    cupti: Any = mosaic_gpu._mosaic_gpu_ext  # pyright: ignore[reportPrivateImportUsage]
    cupti._cupti_init()
    try:
        run()
    finally:
        timings = cupti._cupti_get_timings(True)
    return list(timings or ())
