"""Constants of the kernels' arithmetic, each once, and sizes that follow from powers of two."""

import math

LOG2_E = math.log2(math.e)
"""Factor from natural logarithms to those of base 2, in which kernels compute softmax."""

HIDDEN = -1e30
"""Logit, or exponent, of a key that a query does not see; finite, so that differences stay numbers."""

FLOOR = -1e29
"""Least reference of exponents; so far above HIDDEN that hidden keys vanish where there are no others."""

SIGNED_ANCHOR = 1.5 * 2.0**23
"""float32 to which integers of 23 bits, negative ones too, can be added exactly: they are the low bits of the sum."""

SIGNED_ANCHOR_BITS = 0x4B400000
"""Bits of SIGNED_ANCHOR."""

UNSIGNED_ANCHOR = 2.0**23
"""float32 whose sum with an integer from 0 to 2**23 - 1 has that integer as its low bits."""

UNSIGNED_ANCHOR_BITS = 0x4B000000
"""Bits of UNSIGNED_ANCHOR."""

HALF_ANCHOR = 1024.0
"""float16 whose sum with an integer from 0 to 1023 has that integer as its low bits."""

HALF_ANCHOR_BITS = 0x6400
"""Bits of HALF_ANCHOR."""

MANTISSA_BITS = 23
"""Bits of a float32 below its exponent."""

EXPONENT_BIAS = 127
"""Biased exponent of the float32 1."""

LARGEST_HALF = 65504.0
"""Largest finite float16."""


def power_of_two(size: int) -> int:
    """The least power of two of at least a size.

    Args:
        size: At least 1.

    Example:
        >>> [power_of_two(n) for n in (1, 5, 64)]
        [1, 8, 64]
    """
    return 1 << (size - 1).bit_length()
