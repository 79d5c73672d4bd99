"""Static options of attention logits."""

import dataclasses

import numpy as np


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

    @classmethod
    def for_head_dim(
        cls, head_dim: int, *, scale: float | None, softcap: float | None, sliding_window: int | None
    ) -> "LogitOptions":
        """The options with the scale of a head dim, float32(1/sqrt(head_dim)), if none is given.

        Example:
            >>> LogitOptions.for_head_dim(64, scale=None, softcap=None, sliding_window=None).scale
            0.125
        """
        return cls(scale or float(np.float32(head_dim**-0.5)), softcap, sliding_window)
