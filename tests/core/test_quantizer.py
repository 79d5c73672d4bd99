import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tq_jax as tq
from pallas_kernels.format import Code

ALL = [
    *[tq.QuantizerSpec(64, bits) for bits in (1, 2, 2.5, 3, 3.5, 4, 5, 8)],
    *[tq.QuantizerSpec(64, bits, kind="prod", rotation="haar") for bits in (1, 2, 3, 4, 5, 8)],
    *[tq.QuantizerSpec(64, bits, kind="group") for bits in (2, 4)],
    tq.QuantizerSpec(64, 3, scale="unbiased", search=True, scale_dtype="float32"),
    tq.QuantizerSpec(17, 3), tq.QuantizerSpec(80, 4), tq.QuantizerSpec(512, 1),
]  # fmt: skip
IDS = [f"{s.kind}{s.bits}-{s.dim}-{s.rotation}-{s.scale_rule}" for s in ALL]


def sphere(count, dim, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


@jax.jit
def squared_error(q, x):
    return jnp.mean(jnp.sum((tq.dequantize(q, tq.quantize(q, x)) - x) ** 2, axis=-1))


def mse(spec, x):
    return float(squared_error(tq.make_quantizer(spec), x))


@pytest.mark.parametrize("spec", ALL, ids=IDS)
def test_contract_of_every_kind(spec):
    q, x, y = tq.make_quantizer(spec, seed=3), sphere(40, spec.dim), sphere(40, spec.dim, seed=1)
    code = tq.quantize(q, x)
    assert code.packed.dtype == jnp.uint8
    assert code.nbytes == 40 * spec.bytes_per_vector
    dequantize = jax.jit(tq.dequantize)
    restored = tq.dequantize(q, code)
    direct = jnp.sum(restored * y, axis=-1)
    np.testing.assert_allclose(
        tq.inner_product(q, y, code), direct, atol=2e-5 * float(jnp.max(jnp.abs(restored))) + 1e-5
    )
    for transformed in (jax.jit(tq.quantize)(q, x), jax.vmap(lambda v: tq.quantize(q, v))(x)):
        assert jax.tree.map(jnp.shape, transformed) == jax.tree.map(jnp.shape, code)
        np.testing.assert_allclose(dequantize(q, transformed), restored, atol=0.05)
    again = tq.make_quantizer(spec, seed=3)
    jax.tree.map(np.testing.assert_array_equal, q, again)
    zero = dequantize(q, tq.quantize(q, jnp.zeros_like(x)))  # of a shape whose operations are compiled
    np.testing.assert_array_equal(zero, np.zeros(x.shape))


@pytest.mark.parametrize(
    "options",
    [
        dict(bits=2, scale="norm"),
        dict(bits=2.5, scale="matched"),
        dict(bits=4, scale="least_squares", search=True),
        dict(bits=3, scale="unbiased"),
        dict(bits=3, kind="prod"),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_gradients_are_of_the_scales(options):
    """A longer vector has the same codes and a larger scale: Euler's x f'(x) = f(x), row by row; 0 at zero."""
    q = tq.make_quantizer(tq.QuantizerSpec(64, scale_dtype="float32", **options))
    x, weights = sphere(3, 64).at[1].set(0), sphere(3, 64, seed=1)
    rows, back = jax.vjp(jax.jit(lambda x: jnp.sum(tq.dequantize(q, tq.quantize(q, x)) * weights, axis=-1)), x)
    (gradient,) = back(jnp.ones(3))
    np.testing.assert_allclose(jnp.sum(gradient * x, axis=-1), rows, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.sampled
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
def test_mse_is_the_exact_one(dim, rotation):
    x = sphere(4000, dim)
    for bits in (1, 2, 3, 4):
        exact = tq.codebook.distortion(tq.codebook.codebook(dim, bits))
        assert mse(tq.QuantizerSpec(dim, bits, rotation=rotation, scale="norm"), x) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.1150), (3, 0.0322), (4, 0.0081)])
def test_search(bits, bound):
    assert mse(tq.QuantizerSpec(128, bits, scale="least_squares", search=True), sphere(4000, 128)) <= bound


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_fractional_widths_scale_each_segment(bits):
    """Random vectors have no outliers, so the error is the mix of both widths' (not 15 times more)."""
    low = int(bits)
    few, many = tq.codebook.codebook(32, low + 1), tq.codebook.codebook(96, low)
    want = 0.25 * tq.codebook.distortion(few) + 0.75 * tq.codebook.distortion(many)
    assert mse(tq.QuantizerSpec(128, bits, scale="norm"), sphere(4000, 128)) == pytest.approx(want, rel=0.01)
    assert tq.QuantizerSpec(128, bits).bytes_per_vector == 128 * bits / 8  # the two float16 scales included


@pytest.mark.slow
def test_outlier_channels_get_the_extra_bit():
    x = np.asarray(sphere(2000, 64)) * np.where(np.arange(64) % 4 == 3, 8, 1).astype(np.float32)
    spec = tq.QuantizerSpec(64, 2.5)
    chosen = tq.outlier_channels(jnp.asarray(x), spec.num_outliers)
    assert chosen.tolist() == list(range(3, 64, 4))
    errors = []
    for outliers in (chosen.tolist(), None):
        q = tq.make_quantizer(spec, outliers=outliers)
        errors.append(float(jnp.mean(jnp.square(tq.dequantize(q, tq.quantize(q, jnp.asarray(x))) - x))))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_prod_is_unbiased_with_the_right_variance(bits):
    x, y = sphere(300, 128), sphere(300, 128, seed=1)
    run = jax.jit(lambda q: (tq.inner_product(q, x, tq.quantize(q, x)), tq.inner_product(q, y, tq.quantize(q, x))))
    own, other = zip(
        *[run(tq.make_quantizer(tq.QuantizerSpec(128, bits, kind="prod"), seed=s)) for s in range(40)], strict=True
    )
    assert np.mean(own) == pytest.approx(1, abs=1e-3)
    errors = np.asarray(other) - np.asarray(jnp.sum(x * y, axis=-1))
    want = np.pi / 2 * tq.codebook.distortion(tq.codebook.codebook(128, bits - 1))
    assert 128 * np.mean(errors**2) == pytest.approx(want, rel=0.03)


@pytest.mark.sampled
@pytest.mark.parametrize(("dtype", "precision"), [("float32", 1e-5), ("float16", 1e-3)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 2.5])
def test_unbiased_scale_is_exact_for_every_vector(dtype, precision, bits):
    x = 37 * jnp.asarray(np.random.default_rng(0).standard_t(2, (500, 64)).astype(np.float32))
    q = tq.make_quantizer(tq.QuantizerSpec(64, bits, scale="unbiased", scale_dtype=dtype))
    own, norm = tq.inner_product(q, x, tq.quantize(q, x)), jnp.sum(x * x, axis=-1)
    assert float(jnp.max(jnp.abs(own / norm - 1))) < precision


@pytest.mark.slow
def test_queries_broadcast_against_codes():
    y, x = sphere(24, 64, seed=1), sphere(4, 64)
    for kind in ("mse", "prod"):
        q = tq.make_quantizer(tq.QuantizerSpec(64, 4, kind=kind))
        code = tq.quantize(q, x)
        want = y @ tq.dequantize(q, code).T
        np.testing.assert_allclose(tq.inner_product(q, y[:, None], code), want, atol=1e-5)
        np.testing.assert_allclose(tq.inner_product(q, y.reshape(6, 4, 64), code)[2, 3], want[11, 3], atol=1e-5)


def test_rotation_and_sketch_have_independent_seeds():
    q = tq.make_quantizer(tq.QuantizerSpec(64, 3, kind="prod", rotation="haar"))
    overlap = jnp.abs(q.rotations[0] @ q.sketch.T) / jnp.linalg.norm(q.sketch, axis=1)[None]
    assert float(jnp.max(overlap)) < 0.7


@pytest.mark.slow
def test_scan_and_shard_map():
    spec = tq.QuantizerSpec(64, 4, scale="unbiased", search=True)
    q, x = tq.make_quantizer(spec), sphere(16, 64)
    want = jax.jit(tq.quantize)(q, x)
    _, scanned = jax.lax.scan(lambda carry, v: (carry, tq.quantize(q, v)), 0, x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(tq.quantize, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(q, x)
    for found in (scanned, mapped):
        jax.tree.map(np.testing.assert_array_equal, found, want)


def test_vectors_are_an_array(unchecked_shapes):
    with pytest.raises(ValueError, match="expected an array of vectors of 64 channels, got list"):
        tq.quantize(tq.make_quantizer(tq.QuantizerSpec(64, 4)), [0.5] * 64)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_vectors(dtype):
    q, x = tq.make_quantizer(tq.QuantizerSpec(64, 4)), sphere(8, 64).astype(dtype)
    np.testing.assert_array_equal(tq.quantize(q, x).packed, tq.quantize(q, x.astype(jnp.float32)).packed)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (NotImplementedError, "dim from 16 to 512 is supported, got dim=8$", {"dim": 8}),
        (NotImplementedError, "got dim=768; tq_jax.search.IndexSpec takes wider vectors", {"dim": 768}),
        (ValueError, "expected bits as an integer, got True", {"bits": True}),
        (NotImplementedError, r"kind='mse' has bits in .*, got bits=6", {"bits": 6}),
        (NotImplementedError, r"kind='prod' has bits in .*, got bits=2.5", {"bits": 2.5, "kind": "prod"}),
        (NotImplementedError, r"kind='group' has bits in \(2, 4\), got bits=3", {"bits": 3, "kind": "group"}),
        (NotImplementedError, "bits=2.5 needs a dim that 4 divides, got dim=66", {"bits": 2.5, "dim": 66}),
        (ValueError, "expected kind in .*, got 'vq'", {"kind": "vq"}),
        (ValueError, "expected rotation in .*, got 'none'", {"rotation": "none"}),
        (ValueError, "expected scale in .*, got 'max'", {"scale": "max"}),
        (ValueError, "expected scale_dtype in .*, got 'bfloat16'", {"scale_dtype": "bfloat16"}),
        (ValueError, "expected a group that divides dim=64, got group=24", {"kind": "group", "group": 24}),
        (ValueError, "expected search=False for kind='mse' with scale='norm'", {"scale": "norm", "search": True}),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_spec_errors(error, message, options):
    with pytest.raises(error, match=message):
        tq.QuantizerSpec(**({"dim": 64} | options))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_value_errors():
    q = tq.make_quantizer(tq.QuantizerSpec(64, 4))
    with pytest.raises(ValueError, match=r"expected vectors of 64 channels, got shape \(3, 32\)"):
        tq.quantize(q, jnp.zeros((3, 32)))
    with pytest.raises(ValueError, match="expected floating point vectors, got dtype int32"):
        tq.quantize(q, jnp.zeros((3, 64), jnp.int32))
    for bad in (jnp.nan, jnp.inf, 1e6):
        with pytest.raises(ValueError, match=r"expected finite vectors whose scale fits float16 \(at most 65504\)"):
            tq.quantize(q, jnp.full((2, 64), bad))
    for seed in (-1, 0.5, 2**64):
        with pytest.raises(ValueError, match=f"expected a seed of at least 0, an integer below .*, got {seed}"):
            tq.make_quantizer(tq.QuantizerSpec(64, 4), seed=seed)
    with pytest.raises(ValueError, match="expected 16 different channels below 64 as outliers, got"):
        tq.make_quantizer(tq.QuantizerSpec(64, 2.5), outliers=[1, 1, 2])
    code = tq.quantize(q, jnp.ones((2, 64)))
    with pytest.raises(ValueError, match="expected packed uint8 of 48 bytes, got uint8"):
        tq.dequantize(tq.make_quantizer(tq.QuantizerSpec(128, 3)), code)
    with pytest.raises(ValueError, match="expected a code with packed, scale, signs, residual for kind='prod'"):
        tq.inner_product(tq.make_quantizer(tq.QuantizerSpec(64, 4, kind="prod")), jnp.ones(64), code)
    with pytest.raises(ValueError, match=r"expected scale float32 \(2,\), got float16 \(2,\)"):
        tq.dequantize(tq.make_quantizer(tq.QuantizerSpec(64, 4, scale_dtype="float32")), code)
    for kind, name, message in (
        ("group", "zero", r"expected zero float16 \(2, 2\), got float16 \(1, 2\)"),
        ("prod", "residual", r"expected residual float16 \(2,\), got float16 \(1,\)"),
        ("prod", "signs", r"expected signs uint8 \(2, 8\), got uint8 \(1, 8\)"),
    ):
        q = tq.make_quantizer(tq.QuantizerSpec(64, 4, kind=kind))
        code = tq.quantize(q, jnp.ones((2, 64)))
        with pytest.raises(ValueError, match=message):
            tq.dequantize(q, dataclasses.replace(code, **{name: getattr(code, name)[:1]}))


def test_under_jit_bad_vectors_are_marked():
    q = tq.make_quantizer(tq.QuantizerSpec(64, 4))
    x = jnp.ones((3, 64)).at[1, 3].set(jnp.nan)
    assert jnp.isfinite(jax.jit(tq.quantize)(q, x).scale).tolist() == [True, False, True]


@pytest.mark.slow
def test_golden_error():
    """Any change of codebook, rotation, search or scale shows here."""
    x = jnp.sin(jnp.arange(64 * 64, dtype=jnp.float32).reshape(64, 64) ** 1.1)
    spec = tq.QuantizerSpec(64, 4, scale="unbiased", search=True, scale_dtype="float32")
    q = tq.make_quantizer(spec)
    error = jnp.mean(jnp.square(tq.dequantize(q, tq.quantize(q, x)) - x)) / jnp.mean(jnp.square(x))
    assert float(error) == pytest.approx(GOLDEN_ERROR, rel=1e-4)
    assert isinstance(tq.quantize(q, x), Code)


GOLDEN_ERROR = 0.00666011
