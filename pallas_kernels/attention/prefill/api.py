"""The public prefill op."""

from jaxtyping import Array, Float, Int

from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.attention.partial import Partial
from pallas_kernels.attention.prefill import launch_triton
from pallas_kernels.attention.prefill.config import PrefillConfig
from pallas_kernels.attention.run_pages import attend_pages
from pallas_kernels.format import VectorFormat
from pallas_kernels.pages import Pages


def prefill_attention(
    query: Float[Array, "b t h_q d"],
    pages: Pages,
    block_table: Int[Array, "b n"],
    lengths: Int[Array, "b"],
    *,
    positions: Int[Array, "b t"],
    key_format: VectorFormat,
    value_format: VectorFormat,
    options: LogitOptions,
    logit_bias: Float[Array, "b t h_q"] | None = None,
    sketch_query: Float[Array, "b t h_q d"] | None = None,
    implementation: str = "auto",
    config: PrefillConfig | None = None,
) -> Partial:
    """Attends with many query tokens over packed pages in the rotated basis, on tensor cores straight from the codes.

    It computes what `pallas_kernels.attention.decode_attention` does and takes the same arguments, for the chunks of a
    chunked prefill and for speculated tokens. If the chunk's own tokens are not in the pages, the caller attends to
    them and merges both parts with `merge`.

    Args:
        query: Rotated queries; h_q is a multiple of the pages' KV heads.
        pages: Pools of packed keys and values.
        block_table: Page of each run of page_size tokens of each sequence.
        lengths: Tokens in the pages of each sequence; anything behind them may hold garbage, NaN included.
        positions: Position of each query, counted like the tokens of the pages; in any order.
        key_format: Format of the keys.
        value_format: Format of the values; the kernel reads scales as float16, whatever they are stored as.
        options: Logit scale, soft-cap and sliding window.
        logit_bias: Added to every logit of a query after scaling and before the soft-cap (queries times the key mean).
        sketch_query: S y of the rotated queries, premultiplied by the sketch's gain; needed exactly for Prod keys.
        implementation: "reference" is jnp on any device; "triton" the Pallas kernel, which runs interpreted, slowly,
            where JAX has no GPU; "auto" the kernel on a GPU for what it supports and the reference elsewhere.
        config: Tile sizes of the kernel; by default those for the shapes.

    Returns:
        The partial attention; its `acc` is in the rotated basis of the values.

    Raises:
        ValueError: If head counts or dims do not fit, or sketch_query is missing or superfluous.
        NotImplementedError: For an implementation that does not exist, or "triton" where it does not support the case.
    """
    return attend_pages(
        "prefill",
        launch_triton,
        query,
        pages,
        block_table,
        lengths,
        positions=positions,
        key_format=key_format,
        value_format=value_format,
        options=options,
        logit_bias=logit_bias,
        sketch_query=sketch_query,
        implementation=implementation,
        config=config,
    )
