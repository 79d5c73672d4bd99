"""The public decode op."""

from jaxtyping import Array, Float, Int

from pallas_kernels.decode import reference
from pallas_kernels.decode.options import LogitOptions
from pallas_kernels.decode.pages import Pages
from pallas_kernels.decode.partial import Partial
from pallas_kernels.format import VectorFormat


def decode_attention(
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
) -> Partial:
    """Attends over packed pages in the rotated basis.

    Args:
        query: Rotated queries, float32; h_q is a multiple of the pages' KV heads.
        pages: Pools of packed keys and values.
        block_table: Page of each run of page_size tokens of each sequence.
        lengths: Tokens in the pages of each sequence; anything behind them may hold garbage, NaN included.
        positions: Position of each query, counted like the tokens of the pages.
        key_format: Format of the keys.
        value_format: Format of the values.
        options: Logit scale, soft-cap and sliding window.
        logit_bias: Added to every logit of a query after scaling and before the soft-cap (queries times the key mean).
        sketch_query: S y of the rotated queries, premultiplied by the sketch's gain; needed exactly for Prod keys.
        implementation: "reference" is jnp on any device.

    Returns:
        The partial attention; its `acc` is in the rotated basis of the values.

    Raises:
        ValueError: If head counts or dims do not fit, or sketch_query is missing or superfluous.
        NotImplementedError: For an implementation that does not exist.
    """
    kv_heads = pages.keys.packed.shape[1]
    if query.shape[-1] != key_format.dim or query.shape[2] % kv_heads:
        raise ValueError(
            f"expected queries with a multiple of {kv_heads} heads and dim {key_format.dim}, got {query.shape}"
        )
    if (sketch_query is not None) != getattr(key_format, "residual", False):
        raise ValueError(f"expected sketch_query exactly for Prod keys, got sketch_query={sketch_query is not None}")
    if implementation not in ("auto", "reference"):
        raise NotImplementedError(f"implementation={implementation!r}; decode_attention has: 'reference'")
    return reference.attend_pages(
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
    )
