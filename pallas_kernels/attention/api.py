"""The public operations of attention over packed pages."""

from types import ModuleType
from typing import Any

from pallas_kernels.attention import reference
from pallas_kernels.attention.arguments import PagedArguments
from pallas_kernels.attention.decode import launch_triton as decode
from pallas_kernels.attention.decode.config import TileConfig
from pallas_kernels.attention.partial import Partial
from pallas_kernels.attention.prefill import launch_triton as prefill
from pallas_kernels.attention.prefill.config import PrefillConfig
from pallas_kernels.dispatch import choose


def decode_attention(
    arguments: PagedArguments, *, implementation: str = "auto", config: TileConfig | None = None
) -> Partial:
    """Attends with a few query tokens over packed pages, in the rotated basis.

    Args:
        arguments: Queries, pages and options.
        implementation: See `pallas_kernels.dispatch.Implementation`.
        config: Tile sizes and precision of the kernel; by default those for the page size.

    Returns:
        The partial attention; its `acc` is in the rotated basis of the values.

    Raises:
        ValueError: If head counts or dims do not fit, or the sketch of queries is missing or superfluous.
        NotImplementedError: For an implementation that does not exist, or "triton" if it does not support the case.
    """
    return run_pages(arguments, decode, "decode_attention", implementation, config)


def prefill_attention(
    arguments: PagedArguments, *, implementation: str = "auto", config: PrefillConfig | None = None
) -> Partial:
    """Attends with many query tokens over packed pages, on tensor cores straight from the codes.

    The operation computes the same as `decode_attention`, for chunks of a chunked prefill and for speculated tokens;
    positions may be in any order. If the chunk's own tokens are not in the pages, the caller attends to them and merges
    both parts with `merge`.

    Args:
        arguments: Queries, pages and options. The kernel reads value scales as float16, whatever they are stored as.
        implementation: See `pallas_kernels.dispatch.Implementation`.
        config: Query rows and tokens of a program; by default those for the shapes.

    Returns:
        The partial attention, as `decode_attention` returns it; the errors are the same, too.
    """
    return run_pages(arguments, prefill, "prefill_attention", implementation, config)


def run_pages(x: PagedArguments, kernel: ModuleType, op: str, implementation: str, config: Any) -> Partial:
    """Runs an operation by the reference, or by a kernel's module with `check_supported` and `attend_pages`."""
    x.require_consistent()
    shapes = x.query.shape, x.pages, x.key_format, x.value_format
    chosen = choose(implementation, op=op, check=lambda: kernel.check_supported(*shapes, config), stacklevel=4)
    return kernel.attend_pages(x, config=config) if chosen == "triton" else reference.attend_pages(x)
