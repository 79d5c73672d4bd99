"""Instructions that the compiler would not take by itself, on tiles; interpreted they are jnp."""

import struct
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt

from pallas_kernels.compat.patches import elementwise_assembly
from pallas_kernels.numerics import LOG2_E, UNSIGNED_ANCHOR

INTERPRETED = {"sqrt": jnp.sqrt, "div": jnp.divide, "rcp": jnp.reciprocal, "fma": lambda a, b, c: a * b + c}
"""What `perform` does interpreted."""


def above(magnitude: jax.Array, thresholds: Sequence[float], weights: Sequence[float], *, interpret: bool) -> jax.Array:
    """UNSIGNED_ANCHOR plus the sum of the weights whose thresholds lie below each magnitude."""
    if interpret:
        total = jnp.full(magnitude.shape, UNSIGNED_ANCHOR, jnp.float32)
        for threshold, weight in zip(thresholds, weights, strict=True):
            total = total + jnp.where(magnitude > threshold, np.float32(weight), np.float32(0))
        return total
    lines = [
        f"setp.gt.f32 p, $1, {hexadecimal(t)};\n@p add.f32 $0, $0, {hexadecimal(w)};"
        for t, w in zip(thresholds, weights, strict=True)
    ]
    text = "{\n.reg .pred p;\n" + f"mov.f32 $0, {hexadecimal(UNSIGNED_ANCHOR)};\n" + "\n".join(lines) + "\n}"
    return elementwise_assembly(text, "=&f,f", [magnitude], [jnp.float32])[0]


def floor(x: jax.Array, *, interpret: bool) -> jax.Array:
    """UNSIGNED_ANCHOR plus the integer below."""
    if interpret:
        return jnp.floor(x) + UNSIGNED_ANCHOR
    return elementwise_assembly(f"add.rm.f32 $0, $1, {hexadecimal(UNSIGNED_ANCHOR)};", "=f,f", [x], [jnp.float32])[0]


def perform(instruction: str, *x: jax.Array, interpret: bool) -> jax.Array:
    """One instruction where the compiler would take another: one less exact, slower, or two."""
    if interpret:
        return INTERPRETED[instruction.split(".")[0]](*x)
    names = ", ".join(f"${i}" for i in range(len(x) + 1))
    constraints = ",".join(["=f"] + ["f"] * len(x))
    return elementwise_assembly(f"{instruction} {names};", constraints, x, [jnp.float32])[0]


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """2**x; one instruction, denormal results are zero."""
    return jnp.exp2(x) if interpret else _unary("ex2.approx.ftz.f32", x)


def log2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Base-2 logarithm of normal positive numbers; one instruction."""
    return jnp.log2(x) if interpret else _unary("lg2.approx.ftz.f32", x)


def at_least(x: jax.Array, least: float, *, interpret: bool) -> jax.Array:
    """max(x, least); compiled, NaN becomes `least`."""
    return jnp.maximum(x, least) if interpret else _unary("max.f32", x, f", {hexadecimal(least)}")


def tanh(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Hyperbolic tangent to 2e-7 absolute, which the approximate instruction does not reach."""
    if interpret:
        return jnp.tanh(x)
    decay = exp2(jnp.abs(x) * (-2.0 * LOG2_E), interpret=False)
    return jnp.where(x < 0, -1.0, 1.0) * ((1.0 - decay) / (1.0 + decay))


def _unary(instruction: str, x: jax.Array, more: str = "") -> jax.Array:
    [out] = plt.elementwise_inline_asm(
        f"{instruction} $0, $1{more};",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return out


def hexadecimal(value: float) -> str:
    """A float32 constant of PTX."""
    return "0f" + struct.pack(">f", value).hex().upper()
