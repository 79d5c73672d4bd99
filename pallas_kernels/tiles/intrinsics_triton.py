"""Single instructions, and short runs of instructions, that the compiler would not choose; jnp when interpreted."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt

from pallas_kernels.compat.patches import elementwise_assembly
from pallas_kernels.numerics import LOG2_E, UNSIGNED_ANCHOR
from pallas_kernels.tiles.ptx import Assembly, assembly, block, float_constant

INTERPRETED = {"sqrt": jnp.sqrt, "div": jnp.divide, "rcp": jnp.reciprocal, "fma": lambda a, b, c: a * b + c}
"""The jnp function for each instruction of `perform`."""


def run(code: Assembly, arguments: Sequence[jax.Array]) -> list[jax.Array]:
    """Runs inline PTX on each element of tiles of one shape; returns its results, tiles of that shape."""
    return elementwise_assembly(code.text, code.constraints, arguments, code.result_types)


def above(magnitude: jax.Array, thresholds: Sequence[float], weights: Sequence[float], *, interpret: bool) -> jax.Array:
    """UNSIGNED_ANCHOR plus the sum of the weights whose thresholds lie below each magnitude."""
    if interpret:
        total = jnp.full(magnitude.shape, UNSIGNED_ANCHOR, jnp.float32)
        for threshold, weight in zip(thresholds, weights, strict=True):
            total = total + jnp.where(magnitude > threshold, np.float32(weight), np.float32(0))
        return total
    return run(above_ptx(thresholds, weights), [magnitude])[0]


def above_ptx(thresholds: Sequence[float], weights: Sequence[float]) -> Assembly:
    """PTX of `above`."""
    start = f"mov.f32 $total, {float_constant(UNSIGNED_ANCHOR)};"
    additions = "\n".join(
        f"setp.gt.f32 p, $magnitude, {float_constant(t)};\n@p add.f32 $total, $total, {float_constant(w)};"
        for t, w in zip(thresholds, weights, strict=True)
    )
    text = block(".reg .pred p;", [start, additions])
    return assembly(text, results={"total": "=&f"}, arguments={"magnitude": "f"})


def floor(x: jax.Array, *, interpret: bool) -> jax.Array:
    """UNSIGNED_ANCHOR plus the largest integer that is at most x."""
    return jnp.floor(x) + UNSIGNED_ANCHOR if interpret else run(floor_ptx(), [x])[0]


def floor_ptx() -> Assembly:
    """PTX of `floor`: a sum rounded down."""
    text = f"add.rm.f32 $sum, $x, {float_constant(UNSIGNED_ANCHOR)};"
    return assembly(text, results={"sum": "=f"}, arguments={"x": "f"})


def perform(instruction: str, *x: jax.Array, interpret: bool) -> jax.Array:
    """One instruction, where the compiler would choose a less exact one, a slower one, or two."""
    if interpret:
        return INTERPRETED[instruction.split(".")[0]](*x)
    names = [f"x{i}" for i in range(len(x))]
    text = f"{instruction} {', '.join(f'${name}' for name in ['result', *names])};"
    return run(assembly(text, results={"result": "=f"}, arguments=dict.fromkeys(names, "f")), x)[0]


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """2**x in one instruction; denormal results are zero."""
    return jnp.exp2(x) if interpret else _unary("ex2.approx.ftz.f32", x)


def log2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Base-2 logarithm of normal positive numbers in one instruction."""
    return jnp.log2(x) if interpret else _unary("lg2.approx.ftz.f32", x)


def at_least(x: jax.Array, least: float, *, interpret: bool) -> jax.Array:
    """max(x, least); the compiled instruction turns NaN into `least`."""
    return jnp.maximum(x, least) if interpret else _unary("max.f32", x, f", {float_constant(least)}")


def tanh(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Hyperbolic tangent with an absolute error of 2e-7, which the approximate instruction does not reach."""
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
