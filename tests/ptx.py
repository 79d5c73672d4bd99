"""A small emulator of straight-line PTX, for the inline assembly of kernels; float arithmetic is rounded exactly.

A register is a numpy array of bits, one element per element of a tile: uint32, uint16 for one half of a float16 pair,
bool for predicates.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

LANES_BELOW = np.uint32(0x7FFFFFFF)
"""%lanemask_lt of lane 31."""

INFINITY = np.float64(np.inf)


def f32(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def bits_of(x):
    return np.asarray(x, np.float32).view(np.uint32)


def halves(bits):
    """The float16 pair of a register, the lower half first: [..., 2]."""
    return np.stack([np.asarray(bits) & 0xFFFF, np.asarray(bits) >> 16], -1).astype(np.uint16).view(np.float16)


def bits_of_halves(pair):
    pair = np.ascontiguousarray(pair, np.float16).view(np.uint16).astype(np.uint32)
    return pair[..., 0] | pair[..., 1] << 16


def sum_to_odd(a, b):
    """a + b of float64 numbers, rounded to odd, so that rounding it to a shorter type is as rounding the exact sum."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    even = (total.view(np.uint64) & 1) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    return np.where(inexact, np.nextafter(total, np.where(error > 0, INFINITY, -INFINITY)), total)


def fma_to_odd(a, b, c):
    """a * b + c of float32 or float16 numbers: their product is exact in float64."""
    return sum_to_odd(*np.broadcast_arrays(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)))


def towards(x, dtype, limit):
    """float64 numbers in a shorter type, rounded towards a limit: 0 or an infinity."""
    near = x.astype(dtype)
    wide = near.astype(np.float64)
    over = np.abs(wide) > np.abs(x) if limit == 0 else wide * np.sign(limit) < x * np.sign(limit)
    return np.where(over, np.nextafter(near, np.asarray(limit, dtype)), near)


def saturated(x):
    return np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)


def fma_halves(a, b, c, *, saturate):
    found = fma_to_odd(halves(a), halves(b), halves(c)).astype(np.float16)
    return bits_of_halves(saturated(found) if saturate else found)


def prmt(a, b, selector):
    a, b, selector = np.broadcast_arrays(a, b, selector)
    source = np.stack([(x >> (8 * i)) & 0xFF for x in (a, b) for i in range(4)], -1)
    out = np.uint32(0)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 0xF
        byte = np.take_along_axis(source, (nibble & 7)[..., None].astype(np.int64), -1)[..., 0]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        out = out | byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def pack_bytes(a, b, c):
    """cvt.pack.sat.u8.s32.b32."""
    low, high = (np.clip(np.asarray(x, np.uint32).view(np.int32), 0, 255).astype(np.uint32) for x in (b, a))
    return low | high << 8 | np.asarray(c, np.uint32) << 16


def dot_of_bytes(a, b, c):
    """dp4a.u32.u32."""
    products = [((np.asarray(a) >> (8 * i)) & 0xFF) * ((np.asarray(b) >> (8 * i)) & 0xFF) for i in range(4)]
    return sum(products, np.asarray(c))


def upper_product(a, b):
    return ((np.asarray(a, np.uint64) * np.asarray(b, np.uint64)) >> np.uint64(32)).astype(np.uint32)


def half_pair_of(upper, lower):
    """cvt.rz.f16x2.f32."""
    pair = [towards(f32(x).astype(np.float64), np.float16, 0) for x in (lower, upper)]
    return bits_of_halves(np.stack(np.broadcast_arrays(*pair), -1))


def rounded_fma(a, b, c):
    return bits_of(fma_to_odd(f32(a), f32(b), f32(c)).astype(np.float32))


def truncated_fma(a, b, c):
    return bits_of(towards(fma_to_odd(f32(a), f32(b), f32(c)), np.float32, 0))


def sum_rounded_down(a, b):
    exact = sum_to_odd(*np.broadcast_arrays(f32(a).astype(np.float64), f32(b).astype(np.float64)))
    return bits_of(towards(exact, np.float32, -np.inf))


def sum_of_halves(a, b):
    return bits_of_halves((halves(a).astype(np.float64) + halves(b).astype(np.float64)).astype(np.float16))


OPERATIONS = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "mov.f32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.u32": lambda a, b: a * b,
    "mul.hi.u32": upper_product,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "dp4a.u32.u32": dot_of_bytes,
    "prmt.b32": prmt,
    "lop3.b32": lambda a, b, c, table: {0xCA: a & b | ~a & c}[int(table)],
    "cvt.pack.sat.u8.s32.b32": pack_bytes,
    "abs.f32": lambda a: a & 0x7FFFFFFF,
    "add.f32": lambda a, b: bits_of(f32(a) + f32(b)),
    "sub.f32": lambda a, b: bits_of(f32(a) - f32(b)),
    "mul.f32": lambda a, b: bits_of(f32(a) * f32(b)),
    "mul.rn.f32": lambda a, b: bits_of(f32(a) * f32(b)),
    "div.rn.f32": lambda a, b: bits_of(f32(a) / f32(b)),
    "sqrt.rn.f32": lambda a: bits_of(np.sqrt(f32(a))),
    "sqrt.approx.f32": lambda a: bits_of(np.sqrt(f32(a))),
    "rcp.approx.f32": lambda a: bits_of(1 / f32(a)),
    "rcp.approx.ftz.f32": lambda a: bits_of(1 / f32(a)),
    "min.f32": lambda a, b: bits_of(np.fmin(f32(a), f32(b))),
    "max.f32": lambda a, b: bits_of(np.fmax(f32(a), f32(b))),
    "add.rm.f32": sum_rounded_down,
    "fma.rn.f32": rounded_fma,
    "fma.rz.f32": truncated_fma,
    "setp.gt.f32": lambda a, b: f32(a) > f32(b),
    "cvt.rz.f16x2.f32": half_pair_of,
    "cvt.f32.f16": lambda a: bits_of(np.asarray(a, np.uint16).view(np.float16)),
    "add.rn.f16x2": sum_of_halves,
    "fma.rn.f16x2": lambda a, b, c: fma_halves(a, b, c, saturate=False),
    "fma.rn.sat.f16x2": lambda a, b, c: fma_halves(a, b, c, saturate=True),
}


def _value(operand, registers):
    """The bits of a register or of a constant."""
    if operand.startswith("0f"):
        return np.uint32(int(operand[2:], 16))
    if re.match(r"(0x)?\d", operand):
        return np.uint32(int(operand, 0))
    return registers[operand]


def _execute(instruction, registers):
    predicate, operation, rest = re.fullmatch(r"(?:@(\w+) )?(\S+) (.*)", instruction, re.DOTALL).groups()
    target, rest = re.fullmatch(r"(\{.*?\}|[^,]+),\s*(.*)", rest, re.DOTALL).groups()
    values = [_value(operand, registers) for operand in re.split(r",\s*", rest)]
    if target.startswith("{"):
        assert operation == "mov.b32"
        for name, shift in zip(re.split(r",\s*", target[1:-1]), (0, 16), strict=True):
            registers[name] = ((values[0] >> shift) & 0xFFFF).astype(np.uint16)
        return
    with np.errstate(all="ignore"):
        found = OPERATIONS[operation](*values)
    if predicate is not None:
        found = np.where(registers[predicate], found, registers[target])
    registers[target] = found if found.dtype == bool else found.astype(np.uint32)


def execute(text, registers):
    """Runs straight-line PTX, as lane 31 would, on a dict of registers, and returns the dict."""
    registers = {"%lanemask_lt": LANES_BELOW, **registers}
    text = re.sub(r"//.*", "", text).strip()
    if text.startswith("{\n"):
        text = text[1:-1]
    for instruction in filter(None, (part.strip() for part in text.split(";"))):
        if not instruction.startswith(".reg"):
            _execute(instruction, registers)
    return registers


def emulate(text, result="$0", **registers):
    """Runs straight-line PTX on integers and returns one register as an integer."""
    return int(execute(text, {name: np.uint32(value & 0xFFFFFFFF) for name, value in registers.items()})[result])


def run_tiles(code, *tiles):
    """The results of an Assembly, numpy arrays as its arguments are."""
    count = len(code.result_types)
    assert len(tiles) == len(code.names) - count
    found = execute(code.text, {f"${count + i}": tile.view(np.uint32) for i, tile in enumerate(tiles)})
    wanted = [np.broadcast_to(found[f"${i}"], tiles[0].shape) for i in range(count)]
    return [np.ascontiguousarray(x).view(jnp.dtype(t)) for x, t in zip(wanted, code.result_types, strict=True)]


def run(code, arguments):
    """In place of `pallas_kernels.tiles.intrinsics_triton.run`, for arrays that JAX does not trace."""
    return [jnp.asarray(x) for x in run_tiles(code, *(np.asarray(x) for x in arguments))]


# XLA's threads take denormal numbers for zero, and so would a thread that they start.
_THREAD = ThreadPoolExecutor(1)
_THREAD.submit(int).result()


def run_traced(code, arguments):
    """In place of `pallas_kernels.tiles.intrinsics_triton.run`, for arrays that JAX traces."""
    types = [jax.ShapeDtypeStruct(arguments[0].shape, kind) for kind in code.result_types]

    def call(*tiles):
        return _THREAD.submit(run_tiles, code, *(np.array(tile) for tile in tiles)).result()

    return jax.pure_callback(call, types, *arguments)
