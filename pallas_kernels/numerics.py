"""Constants of the kernels' arithmetic and of tensor-core instructions, each defined once.

Integers travel in the low bits of floats: an anchor is a float so large that its last bit counts one, so the sum of the
anchor and an integer has the integer in its low bits. Kernels convert between integers and floats by such additions and
reinterpreted bits instead of conversion instructions.
"""

import math

LOG2_E = math.log2(math.e)
"""Factor from natural logarithms to base-2 logarithms, in which kernels compute softmax."""

HIDDEN = -1e30
"""Logit, or exponent, of a key that a query does not see; finite, so that differences stay numbers."""

FLOOR = -1e29
"""Least reference of exponents; so far above HIDDEN that hidden keys vanish where a query sees no key."""

SIGNED_ANCHOR = 1.5 * 2.0**23
"""float32 whose sum with an integer from -2**22 to 2**22 - 1 has bits that exceed SIGNED_ANCHOR_BITS by the integer."""

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

BYTE_BITS = 8
"""Bits of a byte: the high byte of a two-byte integer counts 2**BYTE_BITS."""

INSTRUCTION_ROWS, INSTRUCTION_COLUMNS = 16, 8
"""Rows and columns of the result of one tensor-core instruction of a warp (`mma.m16n8`)."""


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`.

    Args:
        size: At least 1.

    Example:
        >>> [power_of_two(n) for n in (1, 5, 64)]
        [1, 8, 64]
    """
    return 1 << (size - 1).bit_length()
