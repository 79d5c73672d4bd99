"""`tq-jax validate`: the paper's theorems and the exact figures of the codebooks, measured through the public API.

The exact distortions are distortions of the optimal scalar quantizer for the coordinate density (arXiv 2504.19874,
section 3.1), to five digits; the paper's own table truncates them.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import tq_jax as tq
from pallas_kernels.packing import unpack
from tq_jax.commands.claims import Claim, conclude
from tq_jax.commands.measures import correlated, distortion, recall, restore, scores, sphere, unit
from tq_jax.commands.options import JsonTarget

BITS = (1, 2, 3, 4)
EXACT_MSE = {
    64: (0.35839, 0.11453, 0.03339, 0.00913),
    128: (0.36089, 0.11600, 0.03397, 0.00932),
    256: (0.36214, 0.11674, 0.03426, 0.00941),
}
GAUSSIAN_MSE = (0.363380, 0.117482, 0.034548, 0.009501)
GAUSSIAN_ENTROPY = (1.0, 1.911, 2.825, 3.765)
GAUSSIAN_CENTROIDS = (
    (0.7979,),
    (0.4528, 1.5104),
    (0.2451, 0.7560, 1.3439, 2.1519),
    (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
)
_quantize = jax.jit(tq.quantize)
_inner_product = jax.jit(tq.inner_product)

UPPER = math.sqrt(3) * math.pi / 2
"""Theorem 1: D_mse <= UPPER * 4**-bits."""


def validate(json: JsonTarget = None) -> None:
    """Check the paper's theorems and the exact figures of the codebooks.

    Measures on random vectors, through the functions that a program calls, what arXiv 2504.19874 proves (Theorems 1-3)
    and what its quantizers must reach exactly. Takes less than a minute on two cores. Exits 0 only if every claim
    holds.
    """
    conclude("TurboQuant, theorems and exact figures", CHECKS, json)


def _mse(bits: float, **options) -> tq.QuantizerSpec:
    """Algorithm 1 as published, at dim 128 unless options change it."""
    return tq.QuantizerSpec(**({"dim": 128, "bits": bits, "kind": "mse", "scale": "norm"} | options))


def _prod(bits: int) -> tq.QuantizerSpec:
    return tq.QuantizerSpec(dim=128, bits=bits, kind="prod")


def worst_case() -> Sequence[Claim]:
    """MSE bound on vectors that are not random."""
    dim = 128
    signs = jnp.sign(jax.random.normal(jax.random.key(2), (dim, dim)))
    inputs = {"one-hot": jnp.eye(dim), "equal magnitudes": signs, "one outlier": signs + 50.0 * jnp.eye(dim)}
    shares = {}
    for name, x in inputs.items():
        for bits in BITS:
            measured = [distortion(_mse(bits, rotation="haar"), unit(x), seed=seed) for seed in range(4)]
            shares[f"{name}, {bits} bits"] = float(np.mean(measured)) * 4**bits / UPPER
    note = "largest share of the bound over one-hot, equal-magnitude and outlier vectors, 1-4 bits, Haar rotations"
    return [Claim("MSE distortion bound (Theorem 1)", max(shares.values()), "<=", 1.0, note=note, details=shares)]


def exact_mse() -> Sequence[Claim]:
    """MSE against the exact table."""
    claims = []
    for dim, exact in EXACT_MSE.items():
        x = sphere(dim, 8192, dim)
        measured = [distortion(_mse(bits, dim=dim), x, seed=1) for bits in BITS]
        worst = max(abs(m / e - 1) for m, e in zip(measured, exact, strict=True))
        note = "measured " + ", ".join(f"{m:.5f}" for m in measured) + " at 1-4 bits on 8192 random unit vectors"
        name = f"MSE equals the exact value, d={dim} (relative deviation)"
        claims.append(
            Claim(name, worst, "<=", 0.01, note=note, details=dict(zip(map(str, BITS), measured, strict=True)))
        )
    return claims


def codebooks() -> Sequence[Claim]:
    """Codebooks against the exact table."""
    own = {(d, b): tq.codebook.distortion(tq.codebook.codebook(d, b)) for d in EXACT_MSE for b in BITS}
    mse = max(abs(own[d, b] / EXACT_MSE[d][b - 1] - 1) for d, b in own)
    limit = [tq.codebook.codebook(4096, bits) for bits in BITS]
    gauss = max(abs(tq.codebook.distortion(c) / e - 1) for c, e in zip(limit, GAUSSIAN_MSE, strict=True))
    shifts = []
    for book, exact in zip(limit, GAUSSIAN_CENTROIDS, strict=True):
        positive = book.centroids[book.centroids > 0] * math.sqrt(book.dim)
        shifts.append(float(np.max(np.abs(positive - np.asarray(exact)))))
    entropy = [_index_entropy(bits) for bits in BITS]
    gap = max(abs(m - e) for m, e in zip(entropy, GAUSSIAN_ENTROPY, strict=True))
    return [
        Claim(
            "Codebook MSE equals the exact table (relative deviation)",
            mse,
            "<=",
            0.005,
            note="integrated over the coordinate density, d = 64, 128, 256, 1-4 bits",
            details={f"d={d}, {b} bits": figure for (d, b), figure in own.items()},
        ),
        Claim("Codebook MSE in the Gaussian limit (relative deviation)", gauss, "<=", 0.002, note="d = 4096"),
        Claim(
            "Centroids in the Gaussian limit (largest shift)",
            max(shifts),
            "<=",
            0.01,
            note="d = 4096, units of the standard deviation; centroids are half-integers of int8 times a step",
        ),
        Claim(
            "Entropy of the index (largest deviation, bits)",
            gap,
            "<=",
            0.01,
            note="counted on codes at d = 512: " + ", ".join(f"{e:.3f}" for e in entropy) + " bits",
        ),
    ]


def _index_entropy(bits: int) -> float:
    spec = _mse(bits, dim=512)
    code = tq.quantize(tq.make_quantizer(spec), sphere(3, 2048, 512))
    counts = np.bincount(np.asarray(unpack(code.packed, bits, 512)).ravel(), minlength=2**bits)
    return float(stats.entropy(counts, base=2))


def prod() -> Sequence[Claim]:
    """Bias and distortion of Prod."""
    dim, cosine = 128, 0.9
    bias, excess = {}, {}
    for bits in (2, 3, 4):
        estimates, errors = [], []
        for seed in range(32):
            x = sphere(seed, 4096, dim)
            q = tq.make_quantizer(_prod(bits), seed=seed)
            code = _quantize(q, x)
            estimates.append(_inner_product(q, correlated(x, cosine, seed=seed + 100), code) / cosine)
            errors.append(_inner_product(q, correlated(x, 0.0, seed=seed + 200), code))
        bias[f"{bits} bits"] = float(jnp.mean(jnp.stack(estimates))) - 1
        predicted = math.pi / 2 * EXACT_MSE[dim][bits - 2]
        excess[f"{bits} bits"] = dim * float(jnp.mean(jnp.stack(errors) ** 2)) / predicted - 1
    pairs = "131,072 pairs at cosine 0.9, 32 rotations and sketches, 2-4 bits"
    ratio = "d * D_prod(b) against (pi/2) * D_mse(b-1), orthogonal pairs, 2-4 bits"
    return [
        Claim("Prod is unbiased (Theorem 2), relative bias", _largest(bias), "<=", 0.001, note=pairs, details=bias),
        Claim("Prod distortion (Theorem 2), deviation", _largest(excess), "<=", 0.03, note=ratio, details=excess),
    ]


def _largest(figures: dict[str, float]) -> float:
    return max(abs(figure) for figure in figures.values())


def scaling() -> Sequence[Claim]:
    """Distortion against 4^-b."""
    x = sphere(5, 8192, 128)
    figures = {f"{bits} bits": distortion(_mse(bits), x) * 4**bits for bits in BITS}
    shares = ", ".join(f"{figure / UPPER:.2f}" for figure in figures.values())
    return [
        Claim(
            "Distortion scales as 4^-b (Theorem 3), largest multiple of 4^-b",
            max(figures.values()),
            "<=",
            UPPER,
            note=f"shares of the upper bound at 1-4 bits: {shares}",
            details=figures,
        ),
        Claim(
            "No quantizer beats 4^-b (Theorem 3), least multiple of 4^-b",
            min(figures.values()),
            ">=",
            1.0,
            note="the information-theoretic lower bound",
            details=figures,
        ),
    ]


def retrieval() -> Sequence[Claim]:
    """Recall, ranks and needles."""
    query, key = sphere(7, 256, 128), sphere(8, 4096, 128)
    exact = scores(query, key)
    specs = {"published MSE": _mse(3), "MSE, unbiased scale": _mse(3, scale="unbiased"), "Prod": _prod(3)}
    estimated = {name: scores(query, restore(spec, key)) for name, spec in specs.items()}
    at8 = {name: recall(exact, estimate, 8) for name, estimate in estimated.items()}
    ranks = {name: _rank_correlation(exact[:64, :2048], table[:64, :2048]) for name, table in estimated.items()}
    needles = {}
    for cosine in (1.0, 0.9, 0.7, 0.5):
        near = scores(correlated(key[:256], cosine, seed=9), restore(specs["published MSE"], key))
        needles[f"cosine {cosine}"] = float(jnp.mean((jnp.argmax(near, axis=1) == jnp.arange(256)).astype(jnp.float32)))
    return [
        Claim("Recall@8, 3 bits, N=4096", min(at8.values()), ">=", 0.40, note=_listed(at8), details=at8),
        Claim("Rank correlation, 3 bits, N=2048", min(ranks.values()), ">=", 0.85, note=_listed(ranks), details=ranks),
        Claim(
            "Needle retrieval, 3 bits, N=4096 (least share found)",
            min(needles.values()),
            ">=",
            0.99,
            note=_listed(needles),
            details=needles,
        ),
    ]


def _listed(figures: dict[str, float]) -> str:
    return "; ".join(f"{name} {figure:.3f}" for name, figure in figures.items())


def _rank_correlation(exact: jax.Array, estimated: jax.Array) -> float:
    pairs = zip(np.asarray(exact), np.asarray(estimated), strict=True)
    return float(np.mean([np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1] for a, b in pairs]))


def step_search() -> Sequence[Claim]:
    """Step search with the least-squares scale."""
    x = sphere(11, 8192, 128)
    claims = []
    for bits, bound in ((4, 0.0081), (3, 0.0322), (2, 0.1150)):
        figure = distortion(_mse(bits, scale="least_squares", search=True), x)
        note = f"{1 - figure / EXACT_MSE[128][bits - 1]:.1%} below the codebook's own step"
        claims.append(Claim(f"MSE with step search at {bits} bits, d=128", figure, "<=", bound, note=note))
    return claims


def unbiased_scale() -> Sequence[Claim]:
    """Self inner products under the unbiased scale."""
    x = sphere(13, 4096, 128) * jnp.linspace(0.1, 30.0, 4096)[:, None]
    squared = jnp.sum(x * x, axis=-1)
    claims = []
    for dtype, bound in (("float32", 1e-5), ("float16", 1e-3)):
        figures = {}
        for bits in BITS:
            q = tq.make_quantizer(_mse(bits, scale="unbiased", scale_dtype=dtype))
            deviation = _inner_product(q, x, _quantize(q, x)) / squared - 1
            figures[f"{bits} bits"] = float(jnp.max(jnp.abs(deviation)))
        name = f"Unbiased scale gives <x^, x> = |x|^2, {dtype} scales (largest relative deviation)"
        claims.append(Claim(name, max(figures.values()), "<=", bound, note="4096 vectors, 1-4 bits", details=figures))
    return claims


def sizes() -> Sequence[Claim]:
    """Stored bytes."""
    code = tq.quantize(tq.make_quantizer(_mse(3)), sphere(17, 16, 128))
    packed = code.packed.nbytes / 16
    spec = tq.CacheSpec(
        num_kv_heads=8,
        head_dim=256,
        max_tokens=32768,
        key=tq.QuantizerSpec(dim=256, bits=3, kind="prod"),
        value=tq.QuantizerSpec(dim=256, bits=2, kind="group", group=32),
    )
    full = 2 * 2 * spec.num_kv_heads * spec.head_dim * spec.max_tokens
    stored = tq.init_cache(spec, batch=1).nbytes
    return [
        Claim(
            "Bytes of a 3-bit code at d=128, scale excluded", packed, "<=", 48, note=f"{code.nbytes / 16:.0f} with it"
        ),
        Claim(
            "Compression ratio against bfloat16, 3-bit Prod keys, 2-bit values, d=256",
            full / stored,
            ">=",
            4.41,
            note=f"{stored:,} bytes for {spec.max_tokens:,} tokens and 8 heads: matrices, scales and windows counted",
        ),
    ]


CHECKS = (worst_case, codebooks, exact_mse, prod, scaling, retrieval, step_search, unbiased_scale, sizes)
