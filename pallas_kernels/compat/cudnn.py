"""cuDNN's attention with its log-sum-exp in float32; `jax.nn.dot_product_attention` rounds it to the queries' type."""

import jax
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

LARGEST_DIM, LARGEST_DIM_HOPPER = 128, 256
"""Channels of a head that cuDNN takes, before and from compute capability 9.0 on."""

HOPPER = 9.0
"""Compute capability of Hopper."""


def check_supported(query: jax.ShapeDtypeStruct | jax.Array, *, softcap: float | None) -> None:
    """Raises NotImplementedError, naming value and limit, for queries that cuDNN does not take on this device.

    Args:
        query: [b, t, h_q, d].
        softcap: Soft-cap of the logits.
    """
    if query.dtype not in (jax.numpy.bfloat16, jax.numpy.float16):
        raise NotImplementedError(f"cuDNN attends in bfloat16 or float16, got {query.dtype}")
    if softcap is not None:
        raise NotImplementedError(f"cuDNN has no soft-cap, got {softcap}")
    hopper = float(getattr(jax.devices()[0], "compute_capability", 0)) >= HOPPER
    limit = LARGEST_DIM_HOPPER if hopper else LARGEST_DIM
    if query.shape[3] > limit or query.shape[3] % 8:
        raise NotImplementedError(f"cuDNN has head dims of multiples of 8 up to {limit}, got {query.shape[3]}")


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
    out, log_sum_exp = dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        mask_type=MaskType.CAUSAL,
        sliding_window_length=sliding_window,
        return_residual=True,
    )
    return out, log_sum_exp.swapaxes(1, 2)
