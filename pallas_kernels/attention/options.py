"""Static options of attention logits."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LogitOptions:
    """What happens to a logit besides the inner product; static.

    Attributes:
        scale: Factor of the inner product, 1/sqrt(head_dim) as a rule.
        softcap: Logits x become softcap * tanh(x / softcap); None for none.
        sliding_window: A query sees itself and the sliding_window - 1 positions before it; None for all.
    """

    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
