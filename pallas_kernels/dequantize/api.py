"""The public operation."""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.dequantize import launch_triton, reference
from pallas_kernels.dequantize.arguments import DequantizeArguments
from pallas_kernels.dispatch import Implementation, choose


def dequantize_pages(
    x: DequantizeArguments, *, tokens: int, dtype: Any, implementation: Implementation = "auto"
) -> tuple[Float[Array, "tokens h d"], Float[Array, "tokens h d"]]:
    """Reads tokens of packed pages as dense keys and values in the original basis.

    Attention of many queries takes no longer over dense tokens than over any others; the copy costs one pass.

    Args:
        x: The pages, and which of their tokens are wanted where.
        tokens: Tokens of the result.
        dtype: Type of the result.
        implementation: See `pallas_kernels.dispatch.Implementation`.

    Returns:
        Keys and values. Places of no token hold zeros with the reference and anything with the kernel.

    Raises:
        NotImplementedError: For an implementation that does not exist, or "triton" if it does not support the case.
    """
    chosen = choose(implementation, op="dequantize_pages", check=lambda: launch_triton.check_supported(x))
    run = launch_triton.dequantize_pages if chosen == "triton" else reference.dequantize_pages
    return run(x, tokens=tokens, dtype=dtype)
