"""The emulator of PTX rounds as the instructions do."""

from fractions import Fraction

import numpy as np
import pytest
from ptx import OPERATIONS, bits_of, bits_of_halves, emulate, f32, halves


def random_floats(seed, count=4000):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * 2.0 ** rng.integers(-30, 30, count)).astype(np.float32)


def neighbours(exact, dtype):
    """The numbers of a type around exact ones, and the nearest of the two (even if tied)."""
    out = []
    for x in exact:
        near = dtype(float(x))
        below = near if Fraction(float(near)) <= x else np.nextafter(near, dtype(-np.inf))
        above = below if Fraction(float(below)) == x else np.nextafter(below, dtype(np.inf))
        low, high = x - Fraction(float(below)), Fraction(float(above)) - x
        even = below if int(below.view(f"u{below.itemsize}")) % 2 == 0 else above
        out.append((below, above, below if low < high else above if high < low else even))
    return [np.array(x, dtype) for x in zip(*out, strict=True)]


def test_fused_sums_are_rounded_once():
    a, b = random_floats(1), random_floats(2)
    c = -(a * b) * np.float32(1) + random_floats(3) * np.float32(1e-7)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    below, above, near = neighbours(exact, np.float32)
    found = {name: f32(OPERATIONS[name](bits_of(a), bits_of(b), bits_of(c))) for name in ("fma.rn.f32", "fma.rz.f32")}
    np.testing.assert_array_equal(found["fma.rn.f32"], near)
    np.testing.assert_array_equal(found["fma.rz.f32"], np.where(np.array(exact) < 0, above, below))


def test_a_fused_sum_next_to_a_tie_is_not_a_tie():
    """Rounded to float64 first, these sums are ties."""
    factor, tiny = bits_of(1 + 2.0**-12), 2.0**-80
    found = [float(f32(OPERATIONS["fma.rn.f32"](factor, factor, bits_of(x)))) for x in (tiny, -tiny)]
    assert found == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11]


def test_truncated_products_below_every_normal_number_are_integers():
    magnitude = np.random.default_rng(0).uniform(0, 120, 1000).astype(np.float32) * np.float32(2.0**-100)
    found = OPERATIONS["fma.rz.f32"](bits_of(magnitude), bits_of(2.0**-48), np.uint32(5))
    np.testing.assert_array_equal(found, np.floor(magnitude.astype(np.float64) * 2.0**101).astype(np.uint32) + 5)


def test_sums_are_rounded_down():
    a, b = random_floats(4), random_floats(5)
    exact = [Fraction(float(x)) + Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(
        f32(OPERATIONS["add.rm.f32"](bits_of(a), bits_of(b))), neighbours(exact, np.float32)[0]
    )


def test_halves_are_rounded_once_and_towards_zero():
    rng = np.random.default_rng(6)
    a, b, c = rng.uniform(-40, 40, (3, 2000, 2)).astype(np.float16)
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a.flat, b.flat, c.flat, strict=True)
    ]
    words = [bits_of_halves(x) for x in (a, b, c)]
    np.testing.assert_array_equal(halves(OPERATIONS["fma.rn.f16x2"](*words)).ravel(), neighbours(exact, np.float16)[2])
    saturated = halves(OPERATIONS["fma.rn.sat.f16x2"](*words)).ravel()
    np.testing.assert_array_equal(saturated, np.clip(neighbours(exact, np.float16)[2], 0, 1))
    x = rng.uniform(-3, 3, (1000, 2)).astype(np.float32) * np.float32(1e-4)
    pair = halves(OPERATIONS["cvt.rz.f16x2.f32"](bits_of(x[:, 1]), bits_of(x[:, 0])))
    below, above, _ = neighbours([Fraction(float(y)) for y in x.ravel()], np.float16)
    np.testing.assert_array_equal(pair.ravel(), np.where(x.ravel() < 0, above, below))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("prmt.b32 $0, 0x84030201, 0x08070685, 0x00FB;", 0x010100FF),
        ("cvt.pack.sat.u8.s32.b32 $0, 0xFFFFFFFF, 300, 0xABCD;", 0xABCD00FF),
        ("dp4a.u32.u32 $0, 0xFF000002, 0xFF000003, 7;", 255 * 255 + 13),
        ("mul.hi.u32 $0, 0xFFFFFFFF, 0xFFFFFFFF;", 0xFFFFFFFE),
        ("mad.lo.u32 $0, 0x01000001, 256, 5;", 0x105),
        ("{\n.reg .pred p;\nmov.u32 $0, 1; setp.gt.f32 p, 0f40000000, 0f3F800000; @p mov.u32 $0, 2;\n}", 2),
        ("{\n.reg .pred p;\nmov.u32 $0, 1; setp.gt.f32 p, 0f3F800000, 0f3F800000; @p mov.u32 $0, 2;\n}", 1),
        ("{\n.reg .b16 x, z;\nmov.b32 {x, z}, 0x3C004000;\ncvt.f32.f16 $0, z;\n}", 0x3F800000),
    ],
)
def test_instructions(text, want):
    assert emulate(text) == want
