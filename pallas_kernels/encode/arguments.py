"""The arguments that the implementations of `encode_pages` share."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.pytree import pytree


@pytree
class EncodeArguments:
    """Tokens, the slots that they go to, and how they are encoded; a pytree.

    Attributes:
        keys: Keys of t tokens per row, any float type.
        values: Values, shaped like the keys.
        slots: Page slot of each token, page * page_size + place, all different; negative skips the token.
        key: The encoder of keys.
        value: The encoder of values.
        mean: Statistics rows that are subtracted from keys; None for keys as they are.
        weight: Statistics rows that the centred keys are multiplied by; None exactly if the mean is None.
        rows: The statistics row of each row; by default all in order.
    """

    keys: Float[Array, "b t h d"]
    values: Float[Array, "b t h d"]
    slots: Int[Array, "b t"]
    key: Encoder
    value: Encoder
    mean: Float[Array, "s h d"] | None = None
    weight: Float[Array, "s h d"] | None = None
    rows: Int[Array, "b"] | None = None


@pytree
class ExactTokens:
    """Pools of tokens in full precision, and the places in them that the tokens of a call are copied to; a pytree.

    Attributes:
        keys: [n, h, d], in the type of the tokens.
        values: Laid out like the keys.
        places: int32 [b, t, 2], place of each token, as the halves of an int64; negative for tokens without one.
    """

    keys: Any
    values: Any
    places: Any
