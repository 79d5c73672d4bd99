"""Static options of attention logits; docs/decode_step.md shows where kernels apply them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LogitOptions:
    """Treatment of a logit besides the inner product; static.

    Attributes:
        scale: Factor of the inner product, usually 1/sqrt(head_dim).
        softcap: Logits x become softcap * tanh(x / softcap); None for no soft-cap.
        sliding_window: A query sees itself and the sliding_window - 1 positions before it; None for all positions.
    """

    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
