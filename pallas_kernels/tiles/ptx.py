"""PTX as text: inline assembly apart from running it, so that tests can run it without a GPU.

A text names its operands (`$factor`); `assembly` numbers them (`$4`), results first, as LLVM wants them.
"""

import dataclasses
import re
import struct
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

EVERY_BYTE = 0x01010101
"""Factor that puts a byte into all four bytes of a register."""

FIRST_BYTES = "0x0040"
"""Selector of `prmt`: byte 0 of both registers, in the lower half of the result."""

THIRD_BYTES = "0x0062"
"""Selector of `prmt`: byte 2 of both registers, in the lower half of the result."""

EVEN_BYTES = "0x0020"
"""Selector of `prmt`: bytes 0 and 2 of the first register, in the lower half of the result."""

EVEN_BYTES_OF_BOTH = "0x6420"
"""Selector of `prmt`: bytes 0 and 2 of the first register, then those of the second."""

LOWER_HALVES = "0x5410"
"""Selector of `prmt`: bytes 0 and 1 of the first register, then those of the second."""

UPPER_HALVES = "0x7632"
"""Selector of `prmt`: bytes 2 and 3 of the first register, then those of the second."""

INTERLEAVED_LOWER_HALVES = "0x5140"
"""Selector of `prmt`: byte 0 of both registers, then byte 1 of both."""

INTERLEAVED_UPPER_HALVES = "0x7362"
"""Selector of `prmt`: byte 2 of both registers, then byte 3 of both."""

SIGN_BYTES = "0x00FB"
"""Selector of `prmt`: the sign bit of both registers, each in all bits of a byte, in the lower half of the result."""


@dataclasses.dataclass(frozen=True)
class Assembly:
    """Inline PTX that computes one element of each result from one element of each argument.

    Attributes:
        text: Instructions; `$i` is operand i, results before arguments.
        constraints: The register of each operand as LLVM writes it: `f` for float32, `r` for 32-bit integers; `=` marks
            a result, `=&` a result that is written before the last argument is read.
        names: Name of each operand.
    """

    text: str
    constraints: str
    names: tuple[str, ...]

    @property
    def result_types(self) -> tuple[type, ...]:
        """JAX type of each result."""
        results = [kind for kind in self.constraints.split(",") if kind.startswith("=")]
        return tuple(jnp.float32 if kind.endswith("f") else jnp.int32 for kind in results)


def assembly(text: str, *, results: Mapping[str, str], arguments: Mapping[str, str]) -> Assembly:
    """Numbers the named operands of a text.

    Args:
        text: Instructions that name operands as `$name`.
        results: Constraint of each result, by name.
        arguments: Constraint of each argument, by name.

    Example:
        >>> assembly("add.f32 $sum, $a, $b;", results={"sum": "=f"}, arguments={"a": "f", "b": "f"}).text
        'add.f32 $0, $1, $2;'
    """
    operands = {**results, **arguments}
    numbers = {name: f"${i}" for i, name in enumerate(operands)}
    numbered = re.sub(r"\$(\w+)", lambda match: numbers[match[1]], text)
    return Assembly(numbered, ",".join(operands.values()), tuple(operands))


def block(declared: str, lines: Sequence[str]) -> str:
    """Instructions with registers of their own."""
    return "{\n" + declared + "\n" + "\n".join(lines) + "\n}"


def float_constant(value: float) -> str:
    """A float32 constant.

    Example:
        >>> float_constant(1.0)
        '0f3F800000'
    """
    return "0f" + struct.pack(">f", value).hex().upper()


def word(value: int) -> str:
    """A 32-bit constant.

    Example:
        >>> word(255)
        '0x000000FF'
    """
    return f"0x{value:08X}"


def half_pair(value: float) -> str:
    """A float16 constant in both halves of a register.

    Example:
        >>> half_pair(1.0)
        '0x3C003C00'
    """
    bits = int(np.float16(value).view(np.uint16))
    return word(bits | bits << 16)


def upper_bytes_of_float(byte: int) -> str:
    """Selector of `prmt`: the float32 whose upper byte is a byte of one register, its next byte one of another.

    The lower two bytes repeat the sign bit of the upper byte, so they are zero for positive floats.

    Args:
        byte: Number of the byte in both registers.

    Example:
        >>> upper_bytes_of_float(2)
        '0x26AA'
    """
    return f"0x{byte:X}{4 + byte:X}{8 + byte:X}{8 + byte:X}"
