"""Instructions that the compiler would not take by itself, on tiles; interpreted they are jnp."""

import struct
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._compat import elementwise_assembly

MAGIC, MAGIC_BITS = 8388608.0, 0x4B000000
"""2**23 and its bits."""


INTERPRETED = {"sqrt": jnp.sqrt, "div": jnp.divide, "rcp": jnp.reciprocal, "fma": lambda a, b, c: a * b + c}
"""What `perform` does interpreted."""


def above(magnitude: jax.Array, thresholds: Sequence[float], weights: Sequence[float], *, interpret: bool) -> jax.Array:
    """MAGIC plus the sum of the weights whose thresholds lie below each magnitude."""
    if interpret:
        total = jnp.full(magnitude.shape, MAGIC, jnp.float32)
        for threshold, weight in zip(thresholds, weights, strict=True):
            total = total + jnp.where(magnitude > threshold, np.float32(weight), np.float32(0))
        return total
    lines = [
        f"setp.gt.f32 p, $1, {hexadecimal(t)};\n@p add.f32 $0, $0, {hexadecimal(w)};"
        for t, w in zip(thresholds, weights, strict=True)
    ]
    text = "{\n.reg .pred p;\n" + f"mov.f32 $0, {hexadecimal(MAGIC)};\n" + "\n".join(lines) + "\n}"
    return elementwise_assembly(text, "=&f,f", [magnitude], [jnp.float32])[0]


def floor(x: jax.Array, *, interpret: bool) -> jax.Array:
    """MAGIC plus the integer below."""
    if interpret:
        return jnp.floor(x) + MAGIC
    return elementwise_assembly(f"add.rm.f32 $0, $1, {hexadecimal(MAGIC)};", "=f,f", [x], [jnp.float32])[0]


def perform(instruction: str, *x: jax.Array, interpret: bool) -> jax.Array:
    """One instruction where the compiler would take another: one less exact, slower, or two."""
    if interpret:
        return INTERPRETED[instruction.split(".")[0]](*x)
    names = ", ".join(f"${i}" for i in range(len(x) + 1))
    constraints = ",".join(["=f"] + ["f"] * len(x))
    return elementwise_assembly(f"{instruction} {names};", constraints, x, [jnp.float32])[0]


def hexadecimal(value: float) -> str:
    """A float32 constant of PTX."""
    return "0f" + struct.pack(">f", value).hex().upper()
