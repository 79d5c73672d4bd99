"""cuDNN's attention with its log-sum-exp in float32; `jax.nn.dot_product_attention` rounds it to the queries' type."""

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

LARGEST_DIM, LARGEST_DIM_HOPPER = 128, 256
"""Channels of a head that cuDNN takes, before and from compute capability 9.0 on."""

HOPPER = 9.0
"""Compute capability of Hopper."""


def supports(query: jax.ShapeDtypeStruct | jax.Array, *, softcap: float | None) -> bool:
    """Whether cuDNN attends with queries [b, t, h_q, d] on this device.

    Args:
        query: The queries.
        softcap: Soft-cap of the logits, which cuDNN has not.
    """
    hopper = float(getattr(jax.devices()[0], "compute_capability", 0)) >= HOPPER
    limit, dim = LARGEST_DIM_HOPPER if hopper else LARGEST_DIM, query.shape[3]
    return query.dtype in (jnp.bfloat16, jnp.float16) and softcap is None and dim <= limit and dim % 8 == 0


def attend_causal(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float, sliding_window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of tokens over themselves.

    Args:
        query: [b, t, h_q, d].
        key: [b, t, h_kv, d].
        value: [b, t, h_kv, d].
        scale: Factor of the logits.
        sliding_window: Tokens that a query sees, itself included; None for all before it.

    Returns:
        Outputs [b, t, h_q, d] in the type of the queries, and log-sum-exps float32 [b, t, h_q].
    """
    found: Any = dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        mask_type=MaskType.CAUSAL,
        sliding_window_length=sliding_window,
        return_residual=True,
    )
    return found[0], found[1].swapaxes(1, 2)
